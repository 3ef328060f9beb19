"""The whole BLAST product of float32 on the CPU in one call, a tile of tokens at a time.

Each thread takes a tile through all three stages: z and w stay in its cache, nothing waits
between stages, and y is written in place.  The matrix products are sgemm of the BLAS library that
PyTorch is built with, called from compiled code.  Three PyTorch calls and what surrounds them
(views, allocations) cost 40 us, as much as the arithmetic of a small layer.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from blast_search.kernels.cpu import couple_tokens
from blast_search.kernels.kept import work_space
from blast_search.kernels.launch import Kernel, compile_kernel, libraries, run
from blast_search.kernels.vectors import I64, copy, define, read, take

# Numbers of z and w in a tile.  Measured at b = 2, 8, 16: 2^17 loses up to a tenth, 2^20 nothing
# more, tiles of 256 tokens now and then; below 32 tokens sgemm packs its operands for too little.
TILE_NUMBERS = 1 << 19
MIN_TILE, MAX_TILE = 32, 128
MIN_SHARE = 8  # tokens for which a thread of its own pays
SERIAL_MACS = 300_000  # below this, waking threads costs more than it saves


@functools.cache
def available() -> bool:
    """Whether PyTorch's own library has sgemm to call."""
    return _sgemm_address() != 0


@functools.cache
def _sgemm_address() -> int:
    """Of sgemm_ (Fortran BLAS, 32-bit integers) in PyTorch's library; 0 if it has none."""
    for library in libraries():
        try:
            return ctypes.cast(library.sgemm_, ctypes.c_void_p).value or 0
        except AttributeError:
            continue
    return 0


def _sgemm() -> Any:
    """A numba intrinsic: C = A B + beta C, all row-major; `transposed`: A B^T.

    It takes a tuple: addresses of A (rows, inner), B (inner, columns), or (columns, inner) if
    transposed, and C (rows, columns); rows, columns, inner; their row strides in numbers; whether
    transposed; whether beta is 1 (else 0).
    """

    def emit(builder: Any, values: Any) -> None:
        a, b, c, rows, columns, inner, a_row, b_row, c_row, transposed, add = values
        i32, f32, char = ir.IntType(32), ir.FloatType(), ir.IntType(8)

        def place(kind: Any, value: Any) -> Any:
            with builder.goto_entry_block():
                slot = builder.alloca(kind)
            builder.store(value, slot)
            return slot

        def count(value: Any) -> Any:
            return place(i32, builder.trunc(value, i32))

        def matrix(address: Any) -> Any:
            return builder.inttoptr(address, f32.as_pointer())

        zero, one = ir.Constant(f32, 0.0), ir.Constant(f32, 1.0)
        chosen = builder.icmp_signed("!=", transposed, ir.Constant(I64, 0))
        letter = builder.select(chosen, ir.Constant(char, ord("T")), ir.Constant(char, ord("N")))
        beta = builder.select(builder.icmp_signed("!=", add, ir.Constant(I64, 0)), one, zero)
        # Column-major, the product is C^T = B^T A^T: the operands change places.
        arguments = [
            place(char, letter), place(char, ir.Constant(char, ord("N"))),
            count(columns), count(rows), count(inner), place(f32, one),
            matrix(b), count(b_row), matrix(a), count(a_row), place(f32, beta),
            matrix(c), count(c_row),
        ]  # fmt: skip
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        target = builder.inttoptr(ir.Constant(I64, _sgemm_address()), kind.as_pointer())
        builder.call(target, arguments)

    return define(emit)


@functools.cache
def _kernel(blocks: int) -> Kernel:
    """The task holds: addresses of x, u, s, v, bias (0: none), y and the work space; tokens, p,
    q, r, the stride of x, tokens per tile.
    """
    sgemm, couple = _sgemm(), couple_tokens(blocks, False)

    def kernel(task: int) -> None:
        x, u, s, v, bias = (
            read(task, 3), read(task, 4), read(task, 5), read(task, 6), read(task, 7),
        )  # fmt: skip
        y, space, tokens = read(task, 8), read(task, 9), read(task, 10)
        p, q, r, x_row, tile = (
            read(task, 11), read(task, 12), read(task, 13), read(task, 14), read(task, 15),
        )  # fmt: skip
        m = blocks * p
        size = blocks * tile * r * 4
        z = space + 2 * size * take(task + 8)
        w = z + size
        while True:
            first = tile * take(task)
            if first >= tokens:
                break
            rows = min(tile, tokens - first)
            xt, yt = x + first * x_row * 4, y + first * m * 4
            for j in range(blocks):
                sgemm((xt + j * q * 4, v + j * q * r * 4, z + j * rows * r * 4,
                       rows, r, q, x_row, r, r, 0, 0))  # fmt: skip
            couple(z, s, w, rows * r * 4, 0, rows, r)
            if bias:
                for row in range(rows):
                    copy(yt + row * m * 4, bias, m * 4)
            add = 1 if bias else 0
            for i in range(blocks):
                sgemm((w + i * rows * r * 4, u + i * p * r * 4, yt + i * p * 4,
                       rows, p, r, r, r, m, 1, add))  # fmt: skip

    return compile_kernel(kernel)


def forward(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """y = x A^T + bias; x (T, n) with unit inner stride; returns (T, m).  All float32."""
    b, p, r = u.shape
    tokens, n = x.shape
    if x.stride(0) < n:  # rows that overlap (expanded, or windows): BLAS would refuse them
        x = x.contiguous()
    y = x.new_empty(tokens, b * p)
    parallel = tokens * r * (n + b * p + b * b) > SERIAL_MACS
    threads = torch.get_num_threads() if parallel else 1
    tile = tile_size(tokens, b * r, threads)
    space = work_space(threads * 2 * b * r * tile).data_ptr()
    values = (
        x.data_ptr(), u.data_ptr(), s.data_ptr(), v.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), space,
        tokens, p, n // b, r, x.stride(0), tile,
    )  # fmt: skip
    run(_kernel(b), parallel, values)
    return y


@functools.cache
def tile_size(tokens: int, width: int, threads: int) -> int:
    """Tokens per tile: as few tiles as the cache allows, and as many for every thread."""
    most = min(MAX_TILE, max(MIN_TILE, TILE_NUMBERS // (2 * width)))
    rounds = -(-tokens // (threads * most))
    return max(MIN_SHARE, -(-tokens // (threads * rounds)))
