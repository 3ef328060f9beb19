"""The coupling step on the CPU: float32 and bfloat16, forward and backward (numba)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from numba import njit
from torch import Tensor

from blast_search.kernels.launch import Kernel, compile_kernel, run
from blast_search.kernels.steps import couple_step, outer_step, pack_step
from blast_search.kernels.vectors import LANES, best_lanes, read, scratch, take

MAX_BLOCKS = 32  # code is unrolled over blocks; matrices of more blocks go through PyTorch
TILE = 32  # tokens per piece of work
TOKENS = 4  # with two rows or more: eight sums hide the latency of a multiply-add
COLUMNS = 4
SERIAL_MACS = 60_000  # below this, waking threads costs more than it saves
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _couple_kernel(blocks: int, bf16: bool, lanes: int) -> Kernel:
    """w_i = sum_j s_ij * z_j; the task holds addresses of z, s, w, and tokens, rank."""
    pack_s = pack_step(blocks, blocks, bf16, lanes)
    pack_z, pack_one = (pack_step(tokens, blocks, bf16, lanes) for tokens in (TOKENS, 1))
    group, one = (couple_rows(blocks, tokens, bf16, lanes) for tokens in (TOKENS, 1))
    couplings, inputs = scratch(blocks * blocks, lanes), scratch(blocks * TOKENS, lanes)
    size = 2 if bf16 else 4

    def kernel(task: int) -> None:
        z, s, w, tokens, rank = (
            read(task, 3), read(task, 4), read(task, 5), read(task, 6), read(task, 7),
        )  # fmt: skip
        token = rank * size
        block = tokens * token
        packed_s, packed_z = couplings(), inputs()
        while True:
            first = TILE * take(task)
            if first >= tokens:
                break
            last = min(tokens, first + TILE)
            for k in range(0, rank, lanes):
                # The last vector overlaps the one before: no scalar remainder.
                at = min(k, rank - lanes) * size
                pack_s((packed_s, s + at, blocks * token, token))
                t = first
                while t + TOKENS <= last:
                    here = t * token + at
                    pack_z((packed_z, z + here, token, block))
                    group(packed_z, packed_s, w + here, block, token)
                    t += TOKENS
                while t < last:
                    here = t * token + at
                    pack_one((packed_z, z + here, token, block))
                    one(packed_z, packed_s, w + here, block, token)
                    t += 1

    return compile_kernel(kernel)


@functools.cache
def couple_rows(blocks: int, tokens: int, bf16: bool, lanes: int) -> Any:
    """Compiled: all rows i of steps.couple_step, some at a time; the same arguments."""
    rows = 4 if lanes > LANES else 2  # as many sums as the registers hold
    step = couple_step(blocks, rows, tokens, bf16, lanes)
    rest = couple_step(blocks, blocks % rows or rows, tokens, bf16, lanes)
    s_row = blocks * 4 * lanes

    @njit  # type: ignore[untyped-decorator]
    def couple(z: int, s: int, w: int, block: int, token: int) -> None:
        i = 0
        while i + rows <= blocks:
            step((z, s + i * s_row, w + i * block, block, token))
            i += rows
        if i < blocks:
            rest((z, s + i * s_row, w + i * block, block, token))

    return couple


@functools.cache
def _outer_kernel(bf16: bool) -> Kernel:
    """ds_ij = sum_t g_it * z_jt; the task holds addresses of g, z, ds, and blocks, tokens, rank.

    One piece of work is one row i (two where possible) at LANES ranks: no two write to one place.
    """
    steps = {
        (rows, columns): outer_step(rows, columns, bf16)
        for rows in (1, 2)
        for columns in (1, COLUMNS)
    }
    pair_wide, pair_one = steps[2, COLUMNS], steps[2, 1]
    single_wide, single_one = steps[1, COLUMNS], steps[1, 1]
    size = 2 if bf16 else 4

    def kernel(task: int) -> None:
        g, z, s = read(task, 3), read(task, 4), read(task, 5)
        blocks, tokens, rank = read(task, 6), read(task, 7), read(task, 8)
        token = rank * size
        block, s_block = tokens * token, rank * 4
        s_row = blocks * s_block
        rows = (blocks + 1) // 2
        vectors = (rank + LANES - 1) // LANES
        wide = blocks // COLUMNS * COLUMNS
        while True:
            index = take(task)
            if index >= rows * vectors:
                break
            i = index % rows * 2
            k = min(index // rows * LANES, rank - LANES)
            gi, zk, sk = g + i * block + k * size, z + k * size, s + i * s_row + k * 4
            j = 0
            while j < blocks:
                place = (
                    gi, zk + j * block, sk + j * s_block, block, token, s_row, s_block, tokens
                )  # fmt: skip
                if i + 1 < blocks:
                    if j < wide:
                        pair_wide(place)
                    else:
                        pair_one(place)
                elif j < wide:
                    single_wide(place)
                else:
                    single_one(place)
                j += COLUMNS if j < wide else 1

    return compile_kernel(kernel)


def supports(num_blocks: int, rank: int, dtype: torch.dtype) -> bool:
    return num_blocks <= MAX_BLOCKS and rank >= LANES and dtype in DTYPES


def couple(z: Tensor, s: Tensor, out: Tensor | None = None) -> Tensor:
    """w_i = sum_j s_ij * z_j, accumulated in float32.

    Args:
        z, out: (b, T, r), contiguous. s: (b, b, r), contiguous. All of one dtype.
    """
    b, tokens, r = z.shape
    w = torch.empty_like(z) if out is None else out
    if tokens:
        kernel = _couple_kernel(b, z.dtype == torch.bfloat16, best_lanes(r))
        values = (z.data_ptr(), s.data_ptr(), w.data_ptr(), tokens, r)
        run(kernel, b * b * tokens * r > SERIAL_MACS, values)
    return w


def couple_grad(g: Tensor, z: Tensor) -> Tensor:
    """The gradient of `couple` with respect to s: sum_t g_it * z_jt, float32.

    Args:
        g: (b, T, r), the gradient of w, contiguous. z: (b, T, r), contiguous.

    Returns:
        (b, b, r).
    """
    b, tokens, r = z.shape
    if not tokens:
        return z.new_zeros(b, b, r, dtype=torch.float32)
    ds = z.new_empty(b, b, r, dtype=torch.float32)
    kernel = _outer_kernel(z.dtype == torch.bfloat16)
    values = (g.data_ptr(), z.data_ptr(), ds.data_ptr(), b, tokens, r)
    run(kernel, b * b * tokens * r > SERIAL_MACS, values)
    return ds
