"""One pass over calibration data -> the Gram E[x x^T] of every layer's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blast_search.batches import Batch, call_model, to_device, token_mask
from blast_search.errors import IncompatibleInputError
from blast_search.layers import get_modules
from blast_search.space import LayerSpec


@torch.no_grad()
def collect_grams(
    model: nn.Module, layers: Sequence[LayerSpec], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Run the calibration batches and average x x^T over real tokens.

    Layers that read the same tensor (query, key, value; gate, up) share one Gram.

    Returns:
        Layer name -> (n, n) float32 on the CPU; a layer that no batch reached is left out.

    Raises:
        IncompatibleInputError: no batches, or an input that is not finite (names the layer).
    """
    if not batches:
        raise IncompatibleInputError("calibration() of the task gave no batch, expected some.")
    modules = get_modules(model, layers)
    leaders: dict[str, str] = {}
    grams: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    inputs: dict[int, tuple[Tensor, str]] = {}  # holds the tensors, so that ids stay unique
    current: Batch = None

    def record(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        leader = leaders.setdefault(name, inputs.setdefault(id(x), (x, name))[1])
        if leader != name:
            return
        mask = token_mask(current, tuple(x.shape)) if x.dim() == 3 else None
        rows = (x[mask] if mask is not None else x.reshape(-1, x.shape[-1])).float()
        # On the CPU: those of a large language model would fill its GPU.
        gram = (rows.T @ rows).cpu()
        if not bool(gram.diagonal().sum().isfinite()):
            raise IncompatibleInputError(
                f"layer {name}: its input on the calibration data holds NaN or infinity. "
                "Check the calibration batches."
            )
        grams[name] = grams[name].add_(gram) if name in grams else gram
        counts[name] = counts.get(name, 0) + len(rows)

    hooks = [
        module.register_forward_pre_hook(
            lambda _m, args, kwargs, name=name: record(name, args, kwargs), with_kwargs=True
        )
        for name, module in modules.items()
    ]
    training = model.training
    try:
        model.eval()
        for current in batches:
            call_model(model, to_device(current, model))
            inputs.clear()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    averages = {name: gram.div_(max(counts[name], 1)) for name, gram in grams.items()}
    return {name: averages[leader] for name, leader in leaders.items()}
