"""The BLAST product and its gradients, one signature, several implementations.

    forward(x, u, s, v, bias, name, keep) -> (y, z)      x (T, n)   y (T, m)
    backward(grad, x, u, s, v, z, needs, name) -> (dx, du, ds, dv)

`choose` names the implementation for a case; the name, with a hash of its source, is part of a
latency cell's key, so a latency measured with one kernel is never used for another.

"triton" (kernels/triton.py) has a forward and a backward of its own; "upcast" computes a half
type in float32; "small" and "tiled" are one compiled call; the others, and the gradients of these,
are composed.py with one coupling step or another.
"""

from __future__ import annotations

import functools
import hashlib
from contextlib import nullcontext
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from blast_search.kernels import composed

Needs = composed.Needs
Gradients = composed.Gradients

SOURCES = {
    "lowrank": ("__init__.py", "kept.py", "composed.py"),
    "small": (
        "__init__.py",
        "kept.py",
        "small.py",
        "cpu.py",
        "steps.py",
        "vectors.py",
        "launch.py",
    ),
    "torch": ("__init__.py", "kept.py", "composed.py", "reference.py"),
    "tiled": (
        "__init__.py",
        "kept.py",
        "composed.py",
        "tiled.py",
        "panels.py",
        "cpu.py",
        "steps.py",
        "vectors.py",
        "launch.py",
    ),
    "numba": (
        "__init__.py",
        "kept.py",
        "composed.py",
        "cpu.py",
        "steps.py",
        "vectors.py",
        "launch.py",
    ),
    "triton": ("__init__.py", "triton.py", "triton_kernels.py", "triton_tune.py"),
}
SOURCES["upcast"] = (*SOURCES["tiled"], "reference.py")

# Up to so many tokens, "small" shares the columns among threads where "tiled" has too few tokens.
SMALL_TOKENS = 16
GROUP = 8  # tokens that "tiled" takes at once
TRITON_BLOCKS = 64  # more need more accumulators than a GPU has registers


def choose(num_blocks: int, rank: int, dtype: torch.dtype, device_type: str, tokens: int) -> str:
    """The kernel for inference in a case, a key of SOURCES.

    "lowrank" (b = 1) is plain products; "tiled" is float32 on a CPU; "small" is for a few tokens
    and bfloat16, its gradients come from "numba"; "upcast" is for half types that the CPU has no
    products for.
    """
    threads = torch.get_num_threads() if device_type == "cpu" else 1
    return _choose(num_blocks, rank, dtype, device_type, tokens, threads)


@functools.cache
def _choose(
    num_blocks: int, rank: int, dtype: torch.dtype, device_type: str, tokens: int, threads: int
) -> str:
    for_triton = num_blocks <= TRITON_BLOCKS and (num_blocks > 1 or tokens == 1)
    if device_type == "cuda" and for_triton:
        known = dtype in (torch.float32, torch.bfloat16, torch.float16)
        if known and find_spec("triton"):
            return "triton"
    if device_type == "cpu":
        from blast_search.kernels import cpu

        if cpu.supports(num_blocks, rank, dtype):
            many = tokens > SMALL_TOKENS
            if dtype == torch.float32 and (many or tokens >= GROUP * threads):
                return "tiled"
            if not many:
                return "small"
            if emulated(dtype):
                return "upcast"
            if num_blocks > 1:
                return "numba"
        if emulated(dtype):
            return "upcast"
    return "lowrank" if num_blocks == 1 else "torch"


@functools.cache
def emulated(dtype: torch.dtype) -> bool:
    """Whether PyTorch has only slow products of this half type on this CPU.

    Without AVX-512 or AMX they take 5 to 40 times as long as float32's, conversions included.
    """
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    try:
        return kind is not None and not getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")()
    except AttributeError:  # built without oneDNN
        return True


@functools.cache
def label(name: str) -> str:
    """The kernel's name with a digest of its source, as it stands in a latency table."""
    digest = hashlib.sha256()
    for source in SOURCES[name]:
        digest.update((Path(__file__).parent / source).read_bytes())
    return f"{name}-{digest.hexdigest()[:8]}"


@functools.cache
def compiler(device_type: str) -> str:
    """What compiles the kernels, with its version: part of what a latency depends on."""
    name = "triton" if device_type == "cuda" else "numba"
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def coupling(name: str) -> ModuleType:
    """The module with `couple` and `couple_grad` of a composed kernel, loaded on first use.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SOURCES:
        raise ValueError(f"kernel {name!r}, expected one of {', '.join(SOURCES)}.")
    return _module("cpu" if name in ("numba", "small", "tiled") else "reference")


@functools.cache
def _module(name: str) -> ModuleType:
    return import_module(f"blast_search.kernels.{name}")


def forward(
    x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None, name: str, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y = x A^T + bias by a kernel of `choose`; shapes as in the legend (matrix.py).

    Returns:
        y (T, m), and z (b, T, r) for `backward` if `keep`.
    """
    whole = name == "small" or (name == "tiled" and _module("tiled").fits(len(x), *u.shape[1:]))
    if whole and not keep:
        bias = None if bias is None else bias.contiguous()
        product = _module(name).forward
        return product(x, u.contiguous(), s.contiguous(), v.contiguous(), bias), None
    if x.is_cpu and emulated(x.dtype):
        wide = choose(len(u), u.shape[2], torch.float32, "cpu", len(x))
        add = None if bias is None else bias.float()
        with torch.autocast("cpu", enabled=False):
            y, z = forward(x.float(), u.float(), s.float(), v.float(), add, wide, keep)
        return y.to(x.dtype), z
    if name == "triton":
        return _module("triton").forward(x, u, s, v, bias=bias), None
    if len(u) == 1 and not keep:
        return composed.low_rank(x, u, s, v, bias), None
    return composed.forward(x, u, s, v, bias, coupling(name), keep)


def backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    z: Tensor | None,
    needs: Needs,
    name: str,
) -> Gradients:
    """Gradients of `forward` for x, u, s, v where needed, given that of y (T, m).

    z is computed again where it was not kept.
    """
    if x.is_cpu and emulated(x.dtype):
        wide = choose(len(u), u.shape[2], torch.float32, "cpu", len(x))
        z = None if z is None else z.float()
        with torch.autocast("cpu", enabled=False):
            found = backward(
                grad.float(), x.float(), u.float(), s.float(), v.float(), z, needs, wide
            )
        dx, du, ds, dv = (None if t is None else t.to(x.dtype) for t in found)
        return dx, du, ds, dv
    # A loss's backward pass may be called within autocast: products would come out in another
    # dtype than the tensors beside them.
    cast = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
    with cast:
        if name == "triton":
            grads: Gradients = _module("triton").backward(grad, x, u, s, v, needs)
            return grads
        return composed.backward(grad, x, u, s, v, z, needs, coupling(name))
