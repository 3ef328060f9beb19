"""The inner steps of the CPU kernels, each a numba intrinsic of one tuple of int64.

Left to itself, LLVM vectorises the coupling over one token and loads both operands of every
multiply-add.  Here a few sums stay in registers while a group of tokens shares each coupling:
on an AVX2 core 23 to 27 GMAC/s at b = 16, where a plain numba loop gave 3 to 7.

Addresses and strides are bytes in int64, so that one step serves every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from blast_search.kernels.vectors import (
    I64,
    LANES,
    Builder,
    Value,
    define,
    floats,
    load,
    load_scalar,
    offset,
    store,
    store_scalar,
    sum_lanes,
)


def couple_step(blocks: int, rows: int, tokens: int, bf16: bool, lanes: int = LANES) -> Any:
    """w[i, t, k] = sum_j s[i, j, k] z[j, t, k] for `rows` i, `tokens` t and one vector of k.

    The intrinsic takes a tuple: the addresses of packed float32 z (tokens, blocks, vector) and
    s (rows, blocks, vector), of w[i, t, k], and the strides of w's blocks and tokens.

    Operands are packed so that their offsets are constants: with 16 x 4 strided operands the
    addresses did not fit the registers, which halved the speed, in a loop over j as well.
    """

    def emit(builder: Builder, values: Sequence[Value]) -> None:
        z, s, w, block, token = values
        sums: dict[tuple[int, int], Value] = {}
        for j in range(blocks):
            factors = [_packed(builder, s, i * blocks + j, lanes) for i in range(rows)]
            for t in range(tokens):
                value = _packed(builder, z, t * blocks + j, lanes)
                for i, factor in enumerate(factors):
                    product = builder.fmul(factor, value, flags=("fast",))
                    old = sums.get((i, t))
                    sums[i, t] = builder.fadd(old, product, flags=("fast",)) if old else product
        for (i, t), value in sums.items():
            store(builder, value, offset(builder, w, (i, block), (t, token)), bf16)

    return define(emit)


def pack_step(rows: int, columns: int, bf16: bool, lanes: int = LANES) -> Any:
    """Copy one vector from each of (rows, columns) places into a packed float32 array.

    The intrinsic takes a tuple: the packed address, the source's address, its two strides.
    """

    def emit(builder: Builder, values: Sequence[Value]) -> None:
        packed, source, row, column = values
        for i in range(rows):
            for j in range(columns):
                place = offset(builder, source, (i, row), (j, column))
                at = builder.add(packed, ir.Constant(I64, 4 * lanes * (i * columns + j)))
                store(builder, load(builder, place, bf16, lanes), at, False)

    return define(emit)


def outer_step(rows: int, columns: int, bf16: bool) -> Any:
    """s[i, j, k] = sum_t g[i, t, k] z[j, t, k] for `rows` i, `columns` j and LANES k.

    The intrinsic takes a tuple: addresses of g[i, 0, k], z[j, 0, k], s[i, j, k] (float32); strides
    of g's and z's blocks and of their tokens, of s's rows and of its blocks; the number of tokens.
    """

    def emit(builder: Builder, values: Sequence[Value]) -> None:
        g, z, s, block, token, s_row, s_block, count = values

        def body(t: Value) -> list[list[Value]]:
            at_g, at_z = offset(builder, g, (t, token)), offset(builder, z, (t, token))
            left = [load(builder, offset(builder, at_g, (i, block)), bf16) for i in range(rows)]
            places = [offset(builder, at_z, (j, block)) for j in range(columns)]
            return products(builder, left, [load(builder, place, bf16) for place in places])

        sums = sum_loop(builder, count, rows, columns, body)
        for i in range(rows):
            for j in range(columns):
                store(builder, sums[i][j], offset(builder, s, (i, s_row), (j, s_block)), False)

    return define(emit)


def down_step(tokens: int, vectors: int, bf16: bool, lanes: int) -> Any:
    """z[t, k] = sum_c x[t, c] v[c, k] for `tokens` t and `vectors` times `lanes` k; z float32.

    The intrinsic takes a tuple: addresses of x[t, 0], v[0, k], z[t, k]; strides of x's tokens, of
    v's rows, of z's tokens; the number of columns c.
    """

    def emit(builder: Builder, values: Sequence[Value]) -> None:
        x, v, z, x_token, v_row, z_token, count = values
        size = ir.Constant(I64, 2 if bf16 else 4)

        def body(c: Value) -> list[list[Value]]:
            at_x, at_v = offset(builder, x, (c, size)), offset(builder, v, (c, v_row))
            places = [offset(builder, at_x, (t, x_token)) for t in range(tokens)]
            steps = [offset(builder, at_v, (lanes * i, size)) for i in range(vectors)]
            left = [load_scalar(builder, place, bf16, lanes) for place in places]
            return products(builder, left, [load(builder, step, bf16, lanes) for step in steps])

        sums = sum_loop(builder, count, tokens, vectors, body, lanes)
        four = ir.Constant(I64, 4)
        for t in range(tokens):
            for i in range(vectors):
                place = offset(builder, z, (t, z_token), (lanes * i, four))
                store(builder, sums[t][i], place, False)

    return define(emit)


def up_step(tokens: int, rows: int, bf16: bool, lanes: int) -> Any:
    """y[t, p] = bias[p] + sum_k w[t, k] u[p, k] for `tokens` t and `rows` p; w float32.

    w is stored in whole vectors.  The last of them belongs to the last LANES columns of u, and its
    lanes that the vector before holds already are zero: no scalar remainder, no read beyond u.

    The intrinsic takes a tuple: addresses of w[t, 0], u[p, 0], y[t, p], bias[p] (0: none); strides
    of w's and y's tokens, of u's rows; the number of vectors; the byte offset of u's last vector.
    """

    def emit(builder: Builder, values: Sequence[Value]) -> None:
        w, u, y, bias, w_token, y_token, u_row, count, last = values
        size = 2 if bf16 else 4

        def body(index: Value) -> list[list[Value]]:
            at_w = offset(builder, w, (index, ir.Constant(I64, 4 * lanes)))
            step = builder.mul(index, ir.Constant(I64, size * lanes))
            step = builder.select(builder.icmp_signed("<", step, last), step, last)
            at_u = builder.add(u, step)
            places = [offset(builder, at_w, (t, w_token)) for t in range(tokens)]
            left = [load(builder, place, False, lanes) for place in places]
            places = [offset(builder, at_u, (p, u_row)) for p in range(rows)]
            return products(builder, left, [load(builder, place, bf16, lanes) for place in places])

        sums = sum_loop(builder, count, tokens, rows, body, lanes)
        totals = [[sum_lanes(builder, value) for value in row] for row in sums]
        biased = builder.icmp_signed("!=", bias, ir.Constant(I64, 0))
        # Where there is no bias, anything readable is read and not used.
        source = builder.select(biased, bias, u)
        for p in range(rows):
            at = builder.add(source, ir.Constant(I64, p * size))
            add = load_scalar(builder, at, bf16, lanes)
            add = builder.select(biased, add, ir.Constant(floats(lanes), [0.0] * lanes))
            for t in range(tokens):
                value = builder.fadd(totals[t][p], add)
                place = offset(builder, y, (t, y_token), (p, ir.Constant(I64, size)))
                store_scalar(builder, value, place, bf16)

    return define(emit)


def _packed(builder: Builder, base: Value, index: int, lanes: int) -> Value:
    return load(builder, builder.add(base, ir.Constant(I64, 4 * lanes * index)), False, lanes)


def products(builder: Builder, left: Sequence[Value], right: Sequence[Value]) -> list[list[Value]]:
    return [[builder.fmul(x, y, flags=("fast",)) for y in right] for x in left]


def sum_loop(
    builder: Builder,
    count: Value,
    rows: int,
    columns: int,
    body: Callable[[Value], list[list[Value]]],
    lanes: int = LANES,
    starts: Sequence[Sequence[Value]] | None = None,
) -> list[list[Value]]:
    """`starts`, or zeros, and what `body` emits for index = 0 .. count - 1 (count >= 1)."""
    zero = ir.Constant(floats(lanes), [0.0] * lanes)
    starts = starts or [[zero] * columns] * rows
    before = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(I64)
    index.add_incoming(ir.Constant(I64, 0), before)
    sums = [[builder.phi(floats(lanes)) for _ in range(columns)] for _ in range(rows)]
    terms = body(index)
    totals = [
        [builder.fadd(total, term, flags=("fast",)) for total, term in zip(*pair, strict=True)]
        for pair in zip(sums, terms, strict=True)
    ]
    for row in zip(sums, starts, totals, strict=True):
        for phi, start, total in zip(*row, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(total, loop)
    following = builder.add(index, ir.Constant(I64, 1))
    index.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    builder.position_at_end(done)
    return totals
