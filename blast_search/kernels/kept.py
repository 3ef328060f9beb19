"""Memory for intermediate values on the CPU, kept by each thread for its next call.

Fresh memory of some megabytes costs more in page faults than the arithmetic done in it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Kept(threading.local):
    def __init__(self) -> None:  # once per thread: no two of them may share memory
        self.spaces: dict[torch.dtype, Tensor] = {}


_kept = _Kept()


def work_space(numbers: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """At least so many numbers; an ordinary tensor, also when made in inference mode."""
    space = _kept.spaces.get(dtype)
    if space is None or space.numel() < numbers:
        with torch.inference_mode(False):
            space = _kept.spaces[dtype] = torch.empty(2 * numbers, dtype=dtype, device="cpu")
    return space
