"""The whole BLAST product of a few tokens on the CPU, in one call.

For a few tokens the arithmetic takes microseconds, and so does every PyTorch call;
three stages by three calls would spend most of their time between them.  Every factor is read
once.  Intermediate values are float32 also where the factors are bfloat16.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from blast_search.kernels.cpu import couple_rows
from blast_search.kernels.kept import work_space
from blast_search.kernels.launch import Kernel, barrier, compile_kernel, run
from blast_search.kernels.steps import down_step, pack_step, up_step
from blast_search.kernels.vectors import best_lanes, put_zero, read, scratch, take

DOWN, COUPLE, UP = 1, 2, 4  # stages
SERIAL_MACS = (
    60_000  # per lane; below this, three wake-ups of the threads cost more than they save
)
WIDE = 4  # vectors of z per piece of work
ROWS = 64  # output rows per piece of work


@functools.cache
def _kernel(blocks: int, bf16: bool, lanes: int) -> Kernel:
    """The task holds: addresses of x, u, s, v, bias (0: none), z, w, y; tokens, p, q, r, and the
    stride of x.
    """
    down_wide, down_one = (down_step(1, vectors, bf16, lanes) for vectors in (WIDE, 1))
    down_pair, down_pair_one = (down_step(2, vectors, bf16, lanes) for vectors in (WIDE, 1))
    up_wide, up_one = (up_step(1, rows, bf16, lanes) for rows in (8, 1))
    up_pair, up_pair_one = (up_step(2, rows, bf16, lanes) for rows in (4, 1))
    pack_s, pack_z = pack_step(blocks, blocks, bf16, lanes), pack_step(blocks, 1, False, lanes)
    couple = couple_rows(blocks, 1, False, lanes)
    couplings, inputs = scratch(blocks * blocks, lanes), scratch(blocks, lanes)
    size, wait = 2 if bf16 else 4, barrier()

    def kernel(task: int) -> None:
        x, u, s, v = read(task, 3), read(task, 4), read(task, 5), read(task, 6)
        bias, z, w, y = read(task, 7), read(task, 8), read(task, 9), read(task, 10)
        tokens, p, q, r = read(task, 11), read(task, 12), read(task, 13), read(task, 14)
        x_stride = read(task, 15) * size
        vectors = (r + lanes - 1) // lanes
        v_row, z_token, w_token = r * size, r * 4, vectors * lanes * 4
        z_block, w_block = tokens * z_token, tokens * w_token
        y_token = blocks * p * size
        chunks = (vectors + WIDE - 1) // WIDE
        wide = r >= WIDE * lanes
        while True:
            index = take(task)
            if index >= blocks * chunks:
                break
            j, chunk = index // chunks, index % chunks
            xj, vj, zj = x + j * q * size, v + j * q * v_row, z + j * z_block
            for t in range(0, tokens, 2):
                xt, zt = xj + t * x_stride, zj + t * z_token
                if wide:
                    k = min(chunk * WIDE * lanes, r - WIDE * lanes)
                    place = (xt, vj + k * size, zt + k * 4, x_stride, v_row, z_token, q)
                    if t + 1 < tokens:
                        down_pair(place)
                    else:
                        down_wide(place)
                else:
                    for i in range(vectors):
                        k = min(i * lanes, r - lanes)
                        place = (xt, vj + k * size, zt + k * 4, x_stride, v_row, z_token, q)
                        if t + 1 < tokens:
                            down_pair_one(place)
                        else:
                            down_one(place)
        wait()
        packed_s, packed_z = couplings(), inputs()
        while True:
            index = take(task + 8)
            if index >= vectors:
                break
            k = min(index * lanes, r - lanes)
            pack_s((packed_s, s + k * size, blocks * v_row, v_row))
            for t in range(tokens):
                pack_z((packed_z, z + t * z_token + k * 4, z_block, z_token))
                at = w + t * w_token + index * lanes * 4
                couple(packed_z, packed_s, at, w_block, w_token)
                for i in range(blocks):
                    for lane in range(index * lanes - k):
                        put_zero(at + i * w_block + lane * 4)
        wait()
        tasks = (p + ROWS - 1) // ROWS
        last = (r - lanes) * size
        while True:
            index = take(task + 16)
            if index >= blocks * tasks:
                break
            i = index // tasks
            first = index % tasks * ROWS
            end = min(p, first + ROWS)
            wi = w + i * w_block
            row = first
            while row < end:
                step = 8 if row + 8 <= end else 1
                at = i * p + row
                up, bp = u + at * v_row, bias + at * size if bias else bias
                for t in range(0, tokens, 2):
                    wt, yt = wi + t * w_token, y + t * y_token + at * size
                    out = (wt, up, yt, bp, w_token, y_token, v_row, vectors, last)
                    if t + 1 == tokens:
                        if step == 8:
                            up_wide(out)
                        else:
                            up_one(out)
                    elif step == 1:
                        up_pair_one(out)
                    else:
                        up_pair(out)
                        bh = bp + 4 * size if bias else bias
                        up_pair((wt, up + 4 * v_row, yt + 4 * size, bh,
                                 w_token, y_token, v_row, vectors, last))  # fmt: skip
                row += step

    return compile_kernel(kernel)


def forward(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """y = x A^T + bias; x (T, n) with unit inner stride; returns (T, m).

    All of one dtype of cpu.DTYPES, factors contiguous.
    """
    b, p, r = u.shape
    tokens, n = x.shape
    y = x.new_empty(tokens, b * p)
    if not tokens:
        return y
    lanes = best_lanes(r)
    padded = (r + lanes - 1) // lanes * lanes
    z = work_space(2 * b * tokens * padded).data_ptr()
    values = (
        x.data_ptr(), u.data_ptr(), s.data_ptr(), v.data_ptr(),
        0 if bias is None else bias.data_ptr(), z, z + 4 * b * tokens * padded, y.data_ptr(),
        tokens, p, n // b, r, x.stride(0),
    )  # fmt: skip
    parallel = tokens * r * (n + b * p + b * b) > SERIAL_MACS * lanes
    run(_kernel(b, x.dtype == torch.bfloat16, lanes), parallel, values)
    return y
