"""The coupling step on the CPU: float32 and bfloat16, forward and backward.

Compiled by numba on first use (no compiler needed on the user's machine) and run on PyTorch's own
OpenMP threads.  Numba's threading layers are not used: their pool competes with PyTorch's for the
cores (each hand-over costs 10 us and more), and starting it silently changes PyTorch's number of
threads.  Where PyTorch has no GNU OpenMP, one thread does the work.

Threads take tasks from a shared counter, so a thread held up by other load simply does fewer.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numba import carray, cfunc, types
from torch import Tensor

from blast_search.kernels.vectors import (
    LANES,
    couple_step,
    fetch_add,
    outer_step,
    pack_step,
    scratch,
)

MAX_BLOCKS = 32  # code is unrolled over blocks; matrices of more blocks go through PyTorch
TILE = 32  # tokens per task
TOKENS = 4  # with two rows: eight sums, which hide the latency of a multiply-add
COLUMNS = 4
SERIAL_MACS = 60_000  # below this, waking threads costs more than it saves
DTYPES = (torch.float32, torch.bfloat16)


class _Kernel(NamedTuple):
    compiled: Any  # keeps the machine code alive
    call: Callable[[int], None]  # with the address of an int64 task array


def _compile(body: Callable[[Any], None]) -> _Kernel:
    compiled = cfunc(types.void(types.CPointer(types.int64)), nopython=True, cache=True)(body)
    return _Kernel(compiled, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address))


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """GOMP_parallel of the OpenMP runtime that PyTorch runs on, or None."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            start = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        start.restype = None
        start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return start  # type: ignore[no-any-return]
    return None


_Task = ctypes.c_int64 * 7


def _run(kernel: _Kernel, macs: int, *values: int) -> None:
    """Run a kernel on the task (address of the counter, *values, ..., counter)."""
    task = _Task(0, *values)
    address = ctypes.addressof(task)
    task[0] = address + 6 * 8
    threads = torch.get_num_threads()
    start = _openmp() if threads > 1 and macs > SERIAL_MACS else None
    if start is None:
        kernel.call(address)
    else:
        start(kernel.compiled.address, address, threads, 0)


@functools.cache
def _couple_kernel(blocks: int, bf16: bool) -> _Kernel:
    """w_i = sum_j s_ij * z_j; task: counter's address, z, s, w, tokens, rank."""
    pack_s, pack_z = pack_step(1, blocks, bf16), pack_step(blocks, TOKENS, bf16)
    pack_one = pack_step(blocks, 1, bf16)
    pair, single = (couple_step(blocks, rows, TOKENS, bf16) for rows in (2, 1))
    one = couple_step(blocks, 1, 1, bf16)
    couplings, inputs = scratch(blocks * blocks), scratch(blocks * TOKENS)
    size = 2 if bf16 else 4
    s_step = blocks * 4 * LANES

    def kernel(task: Any) -> None:
        values = carray(task, 6)
        z, s, w, tokens, rank = values[1], values[2], values[3], values[4], values[5]
        token = rank * size
        block = tokens * token
        packed_s, packed_z = couplings(), inputs()
        while True:
            first = TILE * fetch_add(values[0], 1)
            if first >= tokens:
                break
            last = min(tokens, first + TILE)
            for k in range(0, rank, LANES):
                # The last vector overlaps the one before: no scalar remainder.
                at = min(k, rank - LANES) * size
                for i in range(blocks):
                    pack_s((packed_s + i * s_step, s + i * blocks * token + at, token, token))
                t = first
                while t + TOKENS <= last:
                    here = t * token + at
                    pack_z((packed_z, z + here, block, token))
                    for i in range(0, blocks, 2):
                        si, wi = packed_s + i * s_step, w + here + i * block
                        if i + 1 < blocks:
                            pair((packed_z, si, wi, block, token))
                        else:
                            single((packed_z, si, wi, block, token))
                    t += TOKENS
                while t < last:
                    here = t * token + at
                    pack_one((packed_z, z + here, block, token))
                    for i in range(blocks):
                        si, wi = packed_s + i * s_step, w + here + i * block
                        one((packed_z, si, wi, block, token))
                    t += 1

    return _compile(kernel)


@functools.cache
def _outer_kernel(bf16: bool) -> _Kernel:
    """ds_ij = sum_t g_it * z_jt; task: counter's address, g, z, ds, blocks, tokens * 2^32 + rank.

    One task is one row i (two where possible) at LANES ranks: no two tasks write one place.
    """
    steps = {
        (rows, columns): outer_step(rows, columns, bf16)
        for rows in (1, 2)
        for columns in (1, COLUMNS)
    }
    pair_wide, pair_one = steps[2, COLUMNS], steps[2, 1]
    single_wide, single_one = steps[1, COLUMNS], steps[1, 1]
    size = 2 if bf16 else 4

    def kernel(task: Any) -> None:
        values = carray(task, 6)
        g, z, s, blocks = values[1], values[2], values[3], values[4]
        tokens, rank = values[5] >> 32, values[5] & 0xFFFFFFFF
        token = rank * size
        block, s_block = tokens * token, rank * 4
        s_row = blocks * s_block
        rows = (blocks + 1) // 2
        vectors = (rank + LANES - 1) // LANES
        wide = blocks // COLUMNS * COLUMNS
        while True:
            index = fetch_add(values[0], 1)
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

    return _compile(kernel)


def supports(num_blocks: int, rank: int, dtype: torch.dtype) -> bool:
    return 1 < num_blocks <= MAX_BLOCKS and rank >= LANES and dtype in DTYPES


def couple(z: Tensor, s: Tensor) -> Tensor:
    """w_i = sum_j s_ij * z_j, accumulated in float32.

    Args:
        z: (b, T, r), contiguous. s: (b, b, r), contiguous, the dtype of z.
    """
    b, tokens, r = z.shape
    w = torch.empty_like(z)
    if tokens:
        kernel = _couple_kernel(b, z.dtype == torch.bfloat16)
        pointers = (z.data_ptr(), s.data_ptr(), w.data_ptr())
        _run(kernel, b * b * tokens * r, *pointers, tokens, r)
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
    pointers = (g.data_ptr(), z.data_ptr(), ds.data_ptr())
    _run(kernel, b * b * tokens * r, *pointers, b, tokens << 32 | r)
    return ds
