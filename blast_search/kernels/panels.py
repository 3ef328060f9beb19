"""The inner steps of the tiled kernel: a small matrix product and what arranges its operands.

A panel is some columns of the right operand, one to WIDTH vectors wide, packed row by row: it
stays in the first-level cache while all rows of the left operand pass by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from blast_search.kernels.steps import products, sum_loop
from blast_search.kernels.vectors import (
    I64,
    Builder,
    Value,
    define,
    floats,
    load,
    load_scalar,
    offset,
    store,
)

WIDTH = 3  # vectors; with 8 rows 24 sums, of 32 registers


def product_step(rows: int, width: int, lanes: int) -> Any:
    """c[t, v] = start[t, v] + sum_k a[t, k] panel[k, v] for `rows` t and `width` vectors v.

    The intrinsic takes a tuple: addresses of a, the panel, c and start (0: zeros); strides of the
    rows of a, c and start; the offset of c's second vector and that of its last one (start's are
    the same); the number of k, at least 1.
    """

    def emit(builder: Builder, values: Sequence[Value]) -> None:
        a, panel, c, start, a_row, c_row, start_row, vector, last, number = values

        def place(base: Value, row: Value, t: int, v: int) -> Value:
            at = offset(builder, base, (t, row))
            return builder.add(at, last) if v == width - 1 else offset(builder, at, (v, vector))

        given = builder.icmp_signed("!=", start, ir.Constant(I64, 0))
        zero = ir.Constant(floats(lanes), [0.0] * lanes)

        def first(t: int, v: int) -> Value:
            # Where nothing is given, anything readable is read and not used.
            at = builder.select(given, place(start, start_row, t, v), panel)
            return builder.select(given, load(builder, at, False, lanes), zero)

        def body(k: Value) -> list[list[Value]]:
            at_a = offset(builder, a, (k, ir.Constant(I64, 4)))
            at_panel = offset(builder, panel, (k, ir.Constant(I64, 4 * lanes * width)))
            steps = [builder.add(at_panel, ir.Constant(I64, 4 * lanes * v)) for v in range(width)]
            places = [offset(builder, at_a, (t, a_row)) for t in range(rows)]
            left = [load_scalar(builder, at, False, lanes) for at in places]
            return products(builder, left, [load(builder, step, False, lanes) for step in steps])

        starts = [[first(t, v) for v in range(width)] for t in range(rows)]
        totals = sum_loop(builder, number, rows, width, body, lanes, starts)
        for t in range(rows):
            for v in range(width):
                store(builder, totals[t][v], place(c, c_row, t, v), False)

    return define(emit)


def copy_step(width: int, lanes: int) -> Any:
    """One row of a panel from `width` vectors in memory.

    The intrinsic takes a tuple: the addresses of the row and of the source, the offset of the
    source's last vector (the others follow one another).
    """

    def emit(builder: Builder, values: Sequence[Value]) -> None:
        row, source, last = values
        for v in range(width):
            step = ir.Constant(I64, 4 * lanes * v)
            at = builder.add(source, last if v == width - 1 else step)
            store(builder, load(builder, at, False, lanes), builder.add(row, step), False)

    return define(emit)


def transpose_step(lanes: int) -> Any:
    """target[k, i] = source[i, k] for `lanes` i and k; `lanes` is a power of two.

    The intrinsic takes a tuple: the addresses of source and target, the strides of their rows.
    """

    def emit(builder: Builder, values: Sequence[Value]) -> None:
        source, target, source_row, target_row = values
        rows = [
            load(builder, offset(builder, source, (i, source_row)), False, lanes)
            for i in range(lanes)
        ]
        indices = ir.VectorType(ir.IntType(32), lanes)
        step = 1
        while step < lanes:  # exchange the off-diagonal parts of 2 step x 2 step squares
            low = [k + lanes - step if k & step else k for k in range(lanes)]
            high = [k + lanes if k & step else k + step for k in range(lanes)]
            for i in range(lanes):
                if not i & step:
                    x, y = rows[i], rows[i + step]
                    rows[i] = builder.shuffle_vector(x, y, ir.Constant(indices, low))
                    rows[i + step] = builder.shuffle_vector(x, y, ir.Constant(indices, high))
            step *= 2
        for i, row in enumerate(rows):
            store(builder, row, offset(builder, target, (i, target_row)), False)

    return define(emit)
