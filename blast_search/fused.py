"""PyTorch's fused paths, switched off where they are in the way.

Never where latency is timed: there the dense model runs as its user has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def unfused() -> Iterator[None]:
    """Within it, transformer layers and attention run as the modules that they consist of.

    Their fused path hands hooks nested tensors where there is padding, and leaves zeros at padded
    positions, where a model with replaced layers, which cannot take that path, has other values.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def differentiable(*models: nn.Module) -> Iterator[None]:
    """Within it, gradients pass models in eval mode.

    On CUDA, cuDNN's recurrent layers refuse that; PyTorch's own do not.
    """
    before = torch.backends.cudnn.enabled
    recurrent = any(isinstance(m, nn.RNNBase) for model in models for m in model.modules())
    torch.backends.cudnn.enabled = before and not recurrent
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
