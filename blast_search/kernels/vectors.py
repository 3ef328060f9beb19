"""Vector code for numba, written as LLVM instructions: values in registers and in memory.

Addresses and strides are bytes in int64.
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
    half = _rounded(builder, value)
    builder.store(half, _pointer(builder, address, I16S), align=2)


def _rounded(builder: Builder, value: Value) -> Value:
    """float32 lanes as bfloat16 bits."""
    bits = builder.bitcast(value, I32S)
    odd = builder.and_(builder.lshr(bits, _splat(builder, 16)), _splat(builder, 1))
    rounded = builder.add(builder.add(bits, odd), _splat(builder, 0x7FFF))
    nan = builder.fcmp_unordered("uno", value, value)
    bits = builder.select(nan, _splat(builder, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(bits, _splat(builder, 16)), I16S)


def load_scalar(builder: Builder, address: Value, bf16: bool) -> Value:
    """One value as float32 in all lanes."""
    if bf16:
        raw = builder.load(_pointer(builder, address, ir.IntType(16)), align=2)
        bits = builder.shl(builder.zext(raw, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        value = builder.bitcast(bits, ir.FloatType())
    else:
        value = builder.load(_pointer(builder, address, ir.FloatType()), align=4)
    one = builder.insert_element(
        ir.Constant(F32S, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
    )
    return builder.shuffle_vector(
        one, ir.Constant(F32S, ir.Undefined), ir.Constant(I32S, [0] * LANES)
    )


def sum_lanes(builder: Builder, value: Value) -> Value:
    """The sum over lanes, in lane 0."""
    width = LANES // 2
    while width:
        order = [(lane + width) % LANES for lane in range(LANES)]
        moved = builder.shuffle_vector(value, value, ir.Constant(I32S, order))
        value = builder.fadd(value, moved, flags=("fast",))
        width //= 2
    return value


def store_scalar(builder: Builder, value: Value, address: Value, bf16: bool) -> None:
    """Lane 0, rounded to nearest even where it is kept as bfloat16."""
    lane = ir.Constant(ir.IntType(32), 0)
    if not bf16:
        number = builder.extract_element(value, lane)
        builder.store(number, _pointer(builder, address, ir.FloatType()), align=4)
        return
    half = builder.extract_element(_rounded(builder, value), lane)
    builder.store(half, _pointer(builder, address, ir.IntType(16)), align=2)


def offset(builder: Builder, base: Value, *terms: tuple[int | Value, Value]) -> Value:
    """base + sum of index * stride."""
    for index, stride in terms:
        if index != 0:
            count = ir.Constant(I64, index) if isinstance(index, int) else index
            base = builder.add(base, builder.mul(count, stride))
    return base


def define(emit: Callable[[Builder, Sequence[Value]], None]) -> Any:
    """A numba intrinsic of one tuple of int64 without a result."""

    @intrinsic  # type: ignore[untyped-decorator]
    def generated(typingctx: Any, values: Any) -> Any:
        def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
            emit(builder, cgutils.unpack_tuple(builder, arguments[0]))
            return context.get_dummy_value()

        return types.void(values), codegen

    return generated


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


@intrinsic  # type: ignore[untyped-decorator]
def put_zero(typingctx: Any, address: Any) -> Any:
    """Store a float32 zero at an address."""

    def codegen(context: Any, builder: Builder, signature: Any, values: Any) -> Value:
        zero = ir.Constant(ir.FloatType(), 0.0)
        builder.store(zero, _pointer(builder, values[0], ir.FloatType()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def copy(typingctx: Any, target: Any, source: Any, size: Any) -> Any:
    """Copy bytes from one address to another; the ranges must not overlap."""

    def codegen(context: Any, builder: Builder, signature: Any, values: Any) -> Value:
        places = [_pointer(builder, value, ir.IntType(8)) for value in values[:2]]
        cgutils.raw_memcpy(builder, *places, values[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def take(typingctx: Any, address: Any) -> Any:
    """Atomically add one to the int64 at an address; returns what was there."""

    def codegen(context: Any, builder: Builder, signature: Any, values: Any) -> Value:
        one = ir.Constant(I64, 1)
        return builder.atomic_rmw("add", _pointer(builder, values[0], I64), one, "monotonic")

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def read(typingctx: Any, address: Any, index: Any) -> Any:
    """The int64 number `index` of the array at an address."""

    def codegen(context: Any, builder: Builder, signature: Any, values: Any) -> Value:
        place = offset(builder, values[0], (values[1], ir.Constant(I64, 8)))
        return builder.load(_pointer(builder, place, I64))

    return types.int64(types.int64, types.int64), codegen
