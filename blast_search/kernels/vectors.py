"""Vector code for numba: what its auto-vectoriser does not find, written as LLVM instructions.

Left to itself, LLVM vectorises the coupling over one token and reloads every operand for every
multiply-add (6 GMAC/s per core at b = 16 where this file's kernels give 35).  Here a few
accumulators stay in registers while a group of tokens shares each loaded coupling.

Addresses and strides are bytes in int64, so that one kernel serves every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8  # floats per vector: one AVX register, two NEON ones, half an AVX-512 one
I64 = ir.IntType(64)
F32S = ir.VectorType(ir.FloatType(), LANES)
I32S = ir.VectorType(ir.IntType(32), LANES)
I16S = ir.VectorType(ir.IntType(16), LANES)

Builder = Any  # llvmlite.ir.IRBuilder
Value = Any  # llvmlite.ir.Value


def _pointer(builder: Builder, address: Value, kind: ir.Type) -> Value:
    return builder.inttoptr(address, kind.as_pointer())


def _splat(builder: Builder, value: int) -> Value:
    return ir.Constant(I32S, [value] * LANES)


def load(builder: Builder, address: Value, bf16: bool) -> Value:
    """LANES values as float32; bfloat16 is the upper half of a float32."""
    if not bf16:
        return builder.load(_pointer(builder, address, F32S), align=4)
    raw = builder.zext(builder.load(_pointer(builder, address, I16S), align=2), I32S)
    return builder.bitcast(builder.shl(raw, _splat(builder, 16)), F32S)


def store(builder: Builder, value: Value, address: Value, bf16: bool) -> None:
    """LANES values, rounded to nearest even where they are kept as bfloat16."""
    if not bf16:
        builder.store(value, _pointer(builder, address, F32S), align=4)
        return
    bits = builder.bitcast(value, I32S)
    odd = builder.and_(builder.lshr(bits, _splat(builder, 16)), _splat(builder, 1))
    rounded = builder.add(builder.add(bits, odd), _splat(builder, 0x7FFF))
    nan = builder.fcmp_unordered("uno", value, value)
    bits = builder.select(nan, _splat(builder, 0x7FC00000), rounded)
    half = builder.trunc(builder.lshr(bits, _splat(builder, 16)), I16S)
    builder.store(half, _pointer(builder, address, I16S), align=2)


def offset(builder: Builder, base: Value, *terms: tuple[int | Value, Value]) -> Value:
    """base + sum of index * stride."""
    for index, stride in terms:
        if index != 0:
            count = ir.Constant(I64, index) if isinstance(index, int) else index
            base = builder.add(base, builder.mul(count, stride))
    return base


def _define(emit: Callable[[Builder, Sequence[Value]], None]) -> Any:
    """A numba intrinsic of one tuple of int64 without a result."""

    @intrinsic  # type: ignore[untyped-decorator]
    def generated(typingctx: Any, values: Any) -> Any:
        def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
            emit(builder, cgutils.unpack_tuple(builder, arguments[0]))
            return context.get_dummy_value()

        return types.void(values), codegen

    return generated


def couple_step(blocks: int, rows: int, tokens: int, bf16: bool) -> Any:
    """w[i, t, k] = sum_j s[i, j, k] z[j, t, k] for `rows` i, `tokens` t and LANES k.

    The intrinsic takes a tuple: the addresses of packed float32 z (blocks, tokens, LANES) and
    s (rows, blocks, LANES), of w[i, t, k], and the strides of w's blocks and tokens.

    Operands are packed so that their offsets are constants: with 16 x 4 strided operands the
    addresses did not fit the registers, which halved the speed, in a loop over j as well.
    """

    def emit(builder: Builder, values: Sequence[Value]) -> None:
        z, s, w, block, token = values
        sums: dict[tuple[int, int], Value] = {}
        for j in range(blocks):
            factors = [_packed(builder, s, i * blocks + j) for i in range(rows)]
            for t in range(tokens):
                value = _packed(builder, z, j * tokens + t)
                for i, factor in enumerate(factors):
                    product = builder.fmul(factor, value, flags=("fast",))
                    old = sums.get((i, t))
                    sums[i, t] = builder.fadd(old, product, flags=("fast",)) if old else product
        for (i, t), value in sums.items():
            store(builder, value, offset(builder, w, (i, block), (t, token)), bf16)

    return _define(emit)


def pack_step(rows: int, columns: int, bf16: bool) -> Any:
    """Copy LANES values of (rows, columns) places into a packed float32 array.

    The intrinsic takes a tuple: the packed address, the source's address, its two strides.
    """

    def emit(builder: Builder, values: Sequence[Value]) -> None:
        packed, source, row, column = values
        for i in range(rows):
            for j in range(columns):
                value = load(builder, offset(builder, source, (i, row), (j, column)), bf16)
                place = builder.add(packed, ir.Constant(I64, 4 * LANES * (i * columns + j)))
                store(builder, value, place, False)

    return _define(emit)


def _packed(builder: Builder, base: Value, index: int) -> Value:
    return load(builder, builder.add(base, ir.Constant(I64, 4 * LANES * index)), False)


def scratch(vectors: int) -> Any:
    """The address of `vectors` float32 vectors on the stack of the calling kernel."""

    @intrinsic  # type: ignore[untyped-decorator]
    def generated(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Builder, signature: Any, values: Any) -> Value:
            place = cgutils.alloca_once(builder, ir.ArrayType(F32S, vectors))
            place.align = 64
            return builder.ptrtoint(place, I64)

        return types.int64(), codegen

    return generated


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
            return _products(builder, left, [load(builder, place, bf16) for place in places])

        sums = _sum_loop(builder, count, rows, columns, body)
        for i in range(rows):
            for j in range(columns):
                store(builder, sums[i][j], offset(builder, s, (i, s_row), (j, s_block)), False)

    return _define(emit)


def _products(
    builder: Builder, left: Sequence[Value], right: Sequence[Value]
) -> list[list[Value]]:
    return [[builder.fmul(x, y, flags=("fast",)) for y in right] for x in left]


def _sum_loop(
    builder: Builder,
    count: Value,
    rows: int,
    columns: int,
    body: Callable[[Value], list[list[Value]]],
) -> list[list[Value]]:
    """Sums over index = 0 .. count - 1 (count >= 1) of what `body` emits for an index."""
    before = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(I64)
    index.add_incoming(ir.Constant(I64, 0), before)
    sums = [[builder.phi(F32S) for _ in range(columns)] for _ in range(rows)]
    terms = body(index)
    totals = [
        [builder.fadd(total, term, flags=("fast",)) for total, term in zip(*pair, strict=True)]
        for pair in zip(sums, terms, strict=True)
    ]
    for phis, values in zip(sums, totals, strict=True):
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(ir.Constant(F32S, [0.0] * LANES), before)
            phi.add_incoming(value, loop)
    following = builder.add(index, ir.Constant(I64, 1))
    index.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    builder.position_at_end(done)
    return totals


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Atomically add to the int64 at an address; returns what was there."""

    def codegen(context: Any, builder: Builder, signature: Any, values: Any) -> Value:
        return builder.atomic_rmw("add", _pointer(builder, values[0], I64), values[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen
