"""The whole BLAST product of float32 on the CPU in one call, a tile of tokens at a time.

Each thread takes a tile through all three stages: z and w stay in its cache, nothing waits
between stages, and y is written in place.

The stages were calls of the BLAS library's sgemm before.  It takes products this small at 0.5
to 0.9 of a dense layer's speed: it packs both operands in every call, and its tiles do not suit
24 or 40 columns.  Here only the right operand is packed, z is left as the coupling reads it, and
the last vector of a row overlaps the one before it.

Each thread packs for its own tile.  Packing V and U once per call, all threads together and then
waiting for one another, was tried: with one thread up to a tenth slower (panels out of the cache),
with two up to four times, where another program held one of them up.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from numba import njit
from torch import Tensor

from blast_search.kernels import GROUP
from blast_search.kernels.cpu import TOKENS, couple_rows
from blast_search.kernels.kept import work_space
from blast_search.kernels.launch import Kernel, compile_kernel, run
from blast_search.kernels.panels import WIDTH, copy_step, product_step, transpose_step
from blast_search.kernels.steps import pack_step
from blast_search.kernels.vectors import LANES, best_lanes, copy, read, take

# Numbers of z and w in a tile.  Measured with 2 MB of second-level cache: 2^19 loses up to a sixth
# where b r is large (packing U for few tokens), 2^21 and tiles of 256 tokens now gain, now lose.
TILE_NUMBERS = 1 << 20
MIN_TILE, MAX_TILE = 32, 128
LINE = 16  # numbers in a cache line
INNER = 256  # k per pass of the first stage: a panel of 48 KB
SERIAL_MACS = 600_000  # below this, waking threads costs more than it saves


def fits(tokens: int, p: int, r: int) -> bool:
    """Whether there is a group of tokens, and a vector in a row of each factor."""
    return tokens >= GROUP and min(p, r) >= LANES


@functools.cache
def _products(lanes: int) -> Any:
    """Compiled: product_step for `rows` rows, a multiple of GROUP, and a panel of `width`."""
    # Rows at once, for 32 registers or 16: each holds a sum, a part of the panel's row, or of a's.
    one_rows, two_rows, three_rows = (8, 8, 8) if lanes > LANES else (8, 4, 4)
    one, two, three = (
        product_step(rows, width, lanes)
        for width, rows in enumerate((one_rows, two_rows, three_rows), 1)
    )

    @njit  # type: ignore[untyped-decorator]
    def products(
        width: int, rows: int, a: int, panel: int, c: int, start: int,
        a_row: int, c_row: int, start_row: int, vector: int, last: int, number: int,
    ) -> None:  # fmt: skip
        t = 0
        while t < rows:
            at, to = a + t * a_row, c + t * c_row
            begin = start + t * start_row if start else start
            if width == 3:
                three((at, panel, to, begin, a_row, c_row, start_row, vector, last, number))
                t += three_rows
            elif width == 2:
                two((at, panel, to, begin, a_row, c_row, start_row, vector, last, number))
                t += two_rows
            else:
                one((at, panel, to, begin, a_row, c_row, start_row, vector, last, number))
                t += one_rows

    return products


@functools.cache
def _pack_rows(lanes: int) -> Any:
    """Compiled: a panel of `number` rows of a row-major matrix."""
    one, two, three = (copy_step(width, lanes) for width in (1, 2, 3))

    @njit  # type: ignore[untyped-decorator]
    def pack(width: int, panel: int, source: int, row: int, last: int, number: int) -> None:
        for k in range(number):
            to, at = panel + k * width * lanes * 4, source + k * row
            if width == 3:
                three((to, at, last))
            elif width == 2:
                two((to, at, last))
            else:
                one((to, at, last))

    return pack


@functools.cache
def _pack_columns(lanes: int) -> Any:
    """Compiled: a panel of the transpose: `width` times `lanes` rows of a row-major matrix.

    `last` is the first row of the last vector; `number` is at least `lanes`.
    """
    transpose = transpose_step(lanes)

    @njit  # type: ignore[untyped-decorator]
    def pack(width: int, panel: int, source: int, row: int, last: int, number: int) -> None:
        panel_row = width * lanes * 4
        for v in range(width):
            at = source + (last if v == width - 1 else v * lanes) * row
            for first in range(0, number, lanes):
                k = min(first, number - lanes)
                to = panel + k * panel_row + v * lanes * 4
                transpose((at + k * 4, to, row, panel_row))

    return pack


@njit  # type: ignore[untyped-decorator]
def _panel_width(left: int) -> int:
    """Vectors of the next panel where so many are left: three, but four are two and two."""
    return 3 if left == 3 or left > 4 else min(left, 2)


@functools.cache
def _kernel(blocks: int, lanes: int) -> Kernel:
    """The task holds: addresses of x, u, s, v, bias (0: none), y and the work space; tokens, p,
    q, r, the stride of x, tokens per tile (whole groups), bytes of work space per thread.

    A thread's work space holds z (vector of r, token, block, lanes), packed couplings, a panel, w
    (block, token, r), a spare group of x and of y.  Tokens that do not fill the last group go
    through the spare one.
    """
    products, pack_rows, pack_columns = _products(lanes), _pack_rows(lanes), _pack_columns(lanes)
    pack_s = pack_step(blocks, blocks, False, lanes)
    couple = couple_rows(blocks, TOKENS, False, lanes)
    size = 4 * lanes

    def kernel(task: int) -> None:
        x, u, s, v, bias = (
            read(task, 3), read(task, 4), read(task, 5), read(task, 6), read(task, 7),
        )  # fmt: skip
        y, space, tokens = read(task, 8), read(task, 9), read(task, 10)
        p, q, r, x_row = read(task, 11), read(task, 12), read(task, 13), read(task, 14) * 4
        tile, share = read(task, 15), read(task, 16)
        n_row, m_row, r_row = blocks * q * 4, blocks * p * 4, r * 4
        z_token, w_block = blocks * size, tile * r_row
        z_vector, vectors = tile * z_token, (r + lanes - 1) // lanes
        # What vectors are read from begins with a cache line.
        z = space + share * take(task + 8)
        packed_s = z + vectors * z_vector
        panel = packed_s + blocks * z_token
        w = panel + WIDTH * size * max(r, INNER)
        spare_x = w + blocks * w_block
        spare_y = spare_x + GROUP * n_row
        while True:
            first = tile * take(task)
            if first >= tokens:
                break
            rows = min(tile, tokens - first)
            full = rows // GROUP * GROUP
            rest = rows - full
            groups = full + GROUP if rest else full
            xt, yt = x + first * x_row, y + first * m_row
            for t in range(rest):
                copy(spare_x + t * n_row, xt + (full + t) * x_row, n_row)
            for j in range(blocks):
                vj = v + j * q * r_row
                k = 0
                while k < vectors:
                    width = _panel_width(vectors - k)
                    begin = min(k * lanes, r - lanes)
                    last = min((k + width) * lanes, r) - lanes - begin
                    z_last = (width - 1) * z_vector
                    zk = z + k * z_vector + j * size
                    zr = zk + full * z_token
                    for c in range(0, q, INNER):
                        number, at = min(INNER, q - c), (j * q + c) * 4
                        source = vj + c * r_row + begin * 4
                        pack_rows(width, panel, source, r_row, last * 4, number)
                        products(
                            width, full, xt + at, panel, zk, zk if c else 0,
                            x_row, z_token, z_token, z_vector, z_last, number,
                        )  # fmt: skip
                        if rest:
                            products(
                                width, GROUP, spare_x + at, panel, zr, zr if c else 0,
                                n_row, z_token, z_token, z_vector, z_last, number,
                            )  # fmt: skip
                    k += width
            for k in range(vectors):
                at = min(k * lanes, r - lanes) * 4
                pack_s((packed_s, s + at, blocks * r_row, r_row))
                for t in range(0, groups, TOKENS):
                    zt = z + k * z_vector + t * z_token
                    couple(zt, packed_s, w + t * r_row + at, w_block, r_row)
            for i in range(blocks):
                wi, ui = w + i * w_block, u + i * p * r_row
                k, columns = 0, (p + lanes - 1) // lanes
                while k < columns:
                    width = _panel_width(columns - k)
                    begin = min(k * lanes, p - lanes)
                    last = min((k + width) * lanes, p) - lanes - begin
                    pack_columns(width, panel, ui + begin * r_row, r_row, last, r)
                    at = (i * p + begin) * 4
                    add = bias + at if bias else bias
                    products(
                        width, full, wi, panel, yt + at, add,
                        r_row, m_row, 0, size, last * 4, r,
                    )  # fmt: skip
                    if rest:
                        products(
                            width, GROUP, wi + full * r_row, panel, spare_y + at, add,
                            r_row, m_row, 0, size, last * 4, r,
                        )  # fmt: skip
                    k += width
            for t in range(rest):
                copy(yt + (full + t) * m_row, spare_y + t * m_row, m_row)

    return compile_kernel(kernel)


def forward(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """y = x A^T + bias; x (T, n) with unit inner stride; returns (T, m).

    All float32, factors and bias contiguous, of sizes that `fits`.
    """
    b, p, r = u.shape
    tokens, n = x.shape
    y = x.new_empty(tokens, b * p)
    lanes = best_lanes(p, r)
    parallel = tokens > GROUP and tokens * r * (n + b * p + b * b) > SERIAL_MACS
    threads = torch.get_num_threads() if parallel else 1
    tile = tile_size(tokens, b * r, threads)
    share = -(-r // lanes) * tile * b * lanes + b * tile * r + b * b * lanes
    share += GROUP * (n + b * p) + WIDTH * lanes * max(r, INNER)
    share = (share // LINE + 2) * LINE  # whole cache lines, and none shared by threads
    space = work_space(threads * share).data_ptr()
    values = (
        x.data_ptr(), u.data_ptr(), s.data_ptr(), v.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), space,
        tokens, p, n // b, r, x.stride(0), tile, 4 * share,
    )  # fmt: skip
    run(_kernel(b, lanes), parallel, values)
    return y


@functools.cache
def tile_size(tokens: int, width: int, threads: int) -> int:
    """Tokens per tile, in whole groups: as few tiles as the cache allows, as many per thread."""
    most = min(MAX_TILE, max(MIN_TILE, TILE_NUMBERS // (2 * width)))
    rounds = -(-tokens // (threads * most))
    return -(-tokens // (threads * rounds * GROUP)) * GROUP
