"""Compile a kernel with numba, and run it on PyTorch's own OpenMP threads.

Numba's threading layers are not used: their pool competes with PyTorch's for the cores (each
hand-over costs 10 us and more), and starting it silently changes PyTorch's number of threads.
Where PyTorch has no GNU OpenMP, one thread does the work.

A kernel gets the address of a task, an int64 array that begins with COUNTERS zeros.  Threads take
pieces of the work from these counters, so a thread held up by other load simply does less.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

COUNTERS = 3


class Kernel(NamedTuple):
    compiled: Any  # keeps the machine code alive
    call: Callable[[int], None]


def compile_kernel(body: Callable[[int], None]) -> Kernel:
    """Takes about half a second, once per process and case.

    Numba's cache on disk does not help: its key covers the intrinsics that a body closes over, and
    these get a new identity in every process, so the cache only grows.
    """
    compiled = cfunc(types.void(types.int64), nopython=True)(body)
    return Kernel(compiled, ctypes.CFUNCTYPE(None, ctypes.c_int64)(compiled.address))


@functools.cache
def _libraries() -> tuple[ctypes.CDLL, ...]:
    """PyTorch's CPU library, in which its OpenMP runtime can be looked up."""
    found = []
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            found.append(ctypes.CDLL(str(path)))
        except OSError:
            continue
    return tuple(found)


@functools.cache
def _openmp(name: str) -> Any:
    """A function of the OpenMP runtime that PyTorch runs on, or None."""
    for library in _libraries():
        try:
            return getattr(library, name)
        except AttributeError:
            continue
    return None


@functools.cache
def _start() -> Callable[..., None] | None:
    """GOMP_parallel, or None."""
    start = _openmp("GOMP_parallel")
    if start is None or _openmp("GOMP_barrier") is None:
        return None
    start.restype = None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return start  # type: ignore[no-any-return]


def barrier() -> Any:
    """A numba intrinsic without arguments: wait for the other threads that run the kernel.

    Alone, a thread goes on at once.
    """
    function = _openmp("GOMP_barrier")
    address = ctypes.cast(function, ctypes.c_void_p).value if function else None

    @intrinsic  # type: ignore[untyped-decorator]
    def wait(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if address:
                kind = ir.FunctionType(ir.VoidType(), []).as_pointer()
                builder.call(builder.inttoptr(ir.Constant(ir.IntType(64), address), kind), [])
            return context.get_dummy_value()

        return types.void(), codegen

    return wait


@functools.cache
def _task_type(count: int) -> type[ctypes.Array[ctypes.c_int64]]:
    return ctypes.c_int64 * count


def run(kernel: Kernel, parallel: bool, values: tuple[int, ...]) -> None:
    """Run a kernel on the task (0, 0, 0, *values), on all threads of PyTorch if `parallel`."""
    task = _task_type(COUNTERS + len(values))(0, 0, 0, *values)
    threads = torch.get_num_threads() if parallel else 1
    start = _start() if threads > 1 else None
    if start is None:
        kernel.call(ctypes.addressof(task))
    else:
        start(kernel.compiled.address, ctypes.addressof(task), threads, 0)
