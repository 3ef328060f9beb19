"""Coupling on the CPU with numba: float32, forward only, as many threads as PyTorch uses."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange, set_num_threads
from numba.core import config
from torch import Tensor

TILE = 16  # tokens per task: z of one tile stays in the L1/L2 cache for all output blocks


@njit(parallel=True, fastmath=True, cache=True)  # type: ignore[untyped-decorator]
def _couple(z: np.ndarray, s: np.ndarray, w: np.ndarray) -> None:
    b, tokens, r = z.shape
    for tile in prange((tokens + TILE - 1) // TILE):
        stop = min(tokens, (tile + 1) * TILE)
        for i in range(b):
            for t in range(tile * TILE, stop):
                for k in range(r):
                    w[i, t, k] = z[0, t, k] * s[i, 0, k]
                for j in range(1, b):
                    for k in range(r):
                        w[i, t, k] += z[j, t, k] * s[i, j, k]


def couple(z: Tensor, s: Tensor) -> Tensor:
    """w_i = sum_j s_ij * z_j; z (b, T, r), s (b, b, r), contiguous float32 CPU tensors."""
    w = torch.empty_like(z)
    if z.numel():
        set_num_threads(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))
        _couple(z.detach().numpy(), s.detach().contiguous().numpy(), w.numpy())
    return w
