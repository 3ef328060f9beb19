"""Vector code for numba, written as LLVM instructions: values in registers and in memory.

Addresses and strides are bytes in int64.  A vector has LANES floats unless another number is
given; `best_lanes` gives the best one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8  # floats per vector: one AVX register, two NEON ones, half an AVX-512 one
I64 = ir.IntType(64)

Builder = Any  # llvmlite.ir.IRBuilder
Value = Any  # llvmlite.ir.Value


@functools.cache
def _wide() -> bool:
    try:
        return bool(binding.get_host_cpu_features().get("avx512f"))
    except RuntimeError:  # LLVM cannot ask this kind of CPU
        return False


def best_lanes(*sizes: int) -> int:
    """Floats per vector for rows of these sizes: a whole AVX-512 register, or LANES.

    The last vector of a row overlaps the one before it, so that no row may be shorter than one.
    """
    return 2 * LANES if _wide() and min(sizes) >= 2 * LANES else LANES


def floats(lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.FloatType(), lanes)


def _pointer(builder: Builder, address: Value, kind: ir.Type) -> Value:
    return builder.inttoptr(address, kind.as_pointer())


def _splat(count: int, value: int) -> Value:
    return ir.Constant(ir.VectorType(ir.IntType(32), count), [value] * count)


def load(builder: Builder, address: Value, bf16: bool, lanes: int = LANES) -> Value:
    """`lanes` values as float32; bfloat16 is the upper half of a float32."""
    if not bf16:
        return builder.load(_pointer(builder, address, floats(lanes)), align=4)
    halves = ir.VectorType(ir.IntType(16), lanes)
    raw = builder.load(_pointer(builder, address, halves), align=2)
    bits = builder.zext(raw, ir.VectorType(ir.IntType(32), lanes))
    return builder.bitcast(builder.shl(bits, _splat(lanes, 16)), floats(lanes))


def store(builder: Builder, value: Value, address: Value, bf16: bool) -> None:
    """A vector, rounded to nearest even where it is kept as bfloat16."""
    if not bf16:
        builder.store(value, _pointer(builder, address, value.type), align=4)
        return
    half = _rounded(builder, value)
    builder.store(half, _pointer(builder, address, half.type), align=2)


def _rounded(builder: Builder, value: Value) -> Value:
    """float32 lanes as bfloat16 bits."""
    count = value.type.count
    bits = builder.bitcast(value, ir.VectorType(ir.IntType(32), count))
    odd = builder.and_(builder.lshr(bits, _splat(count, 16)), _splat(count, 1))
    rounded = builder.add(builder.add(bits, odd), _splat(count, 0x7FFF))
    nan = builder.fcmp_unordered("uno", value, value)
    bits = builder.select(nan, _splat(count, 0x7FC00000), rounded)
    return builder.trunc(
        builder.lshr(bits, _splat(count, 16)), ir.VectorType(ir.IntType(16), count)
    )


def load_scalar(builder: Builder, address: Value, bf16: bool, lanes: int = LANES) -> Value:
    """One value as float32 in all lanes."""
    if bf16:
        raw = builder.load(_pointer(builder, address, ir.IntType(16)), align=2)
        bits = builder.shl(builder.zext(raw, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        value = builder.bitcast(bits, ir.FloatType())
    else:
        value = builder.load(_pointer(builder, address, ir.FloatType()), align=4)
    undefined = ir.Constant(floats(lanes), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, undefined, _splat(lanes, 0))


def sum_lanes(builder: Builder, value: Value) -> Value:
    """The sum over lanes, in lane 0."""
    count = value.type.count
    width = count // 2
    indices = ir.VectorType(ir.IntType(32), count)
    while width:
        order = [(lane + width) % count for lane in range(count)]
        moved = builder.shuffle_vector(value, value, ir.Constant(indices, order))
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


def scratch(vectors: int, lanes: int = LANES) -> Any:
    """The address of `vectors` float32 vectors on the stack of the calling kernel."""

    @intrinsic  # type: ignore[untyped-decorator]
    def generated(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Builder, signature: Any, values: Any) -> Value:
            place = cgutils.alloca_once(builder, ir.ArrayType(floats(lanes), vectors))
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
