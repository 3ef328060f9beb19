"""The coupling step of a BLAST product, one signature, several implementations.

    couple(z, s) -> w        w_i = sum_j s_ij * z_j
    z: (b, T, r)   s: (b, b, r)   w: (b, T, r)

It is the step that decides whether BLAST is fast: memory-bound, b^2 T r multiply-adds.
`choose` names the implementation for a case; the name is part of a latency cell's key, so a
latency measured with one kernel is never used for another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Couple = Callable[[Tensor, Tensor], Tensor]


def choose(num_blocks: int, dtype: torch.dtype, device_type: str, inference: bool = True) -> str:
    """The kernel for a case: "lowrank" (b = 1: none needed), "numba" or "torch"."""
    if num_blocks == 1:
        return "lowrank"
    if device_type == "cpu" and dtype == torch.float32 and inference:
        return "numba"
    return "torch"


def get_couple(name: str) -> Couple:
    """The implementation called `name` ("numba" or "torch"); loads it on first use."""
    match name:
        case "numba":
            from blast_search.kernels import cpu

            return cpu.couple
        case "torch":
            from blast_search.kernels import reference

            return reference.couple
        case _:
            raise ValueError(f"kernel {name!r}, expected 'numba' or 'torch'.")
