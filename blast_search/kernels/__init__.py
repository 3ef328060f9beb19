"""The BLAST product and its gradients, one signature, several implementations.

    forward(x, u, s, v, bias, name, keep) -> (y, z)      x (T, n)   y (T, m)
    backward(grad, x, u, s, v, z, needs, name) -> (dx, du, ds, dv)

`choose` names the implementation for a case; the name, with a hash of its source, is part of a
latency cell's key, so a latency measured with one kernel is never used for another.

"triton" (kernels/triton.py) has a forward and a backward of its own; "upcast" computes a half
type in float32.  The others are two batched matrix products with the coupling step in between:

    z_j = x_j V_j      w_i = sum_j s_ij * z_j      y_i = w_i U_i^T + bias_i

The coupling decides whether BLAST is fast: memory-bound, b^2 T r multiply-adds.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Needs = tuple[bool, bool, bool, bool]  # which gradients are wanted: x, u, s, v
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

SOURCES = {
    "lowrank": ("__init__.py",),
    "small": ("__init__.py", "small.py", "steps.py", "vectors.py", "launch.py"),
    "torch": ("__init__.py", "reference.py"),
    "numba": ("__init__.py", "cpu.py", "steps.py", "vectors.py", "launch.py"),
    "upcast": ("__init__.py", "cpu.py", "steps.py", "vectors.py", "launch.py", "reference.py"),
    "triton": ("__init__.py", "triton.py", "triton_kernels.py", "triton_tune.py"),
}

# Tokens per pass on the CPU: z and w of one pass stay in the cache.
CPU_CHUNK = 512

# Up to so many tokens, one compiled call for all three stages beats three PyTorch calls.
SMALL_TOKENS = 16

# From so many output numbers on, writing through a stride pays: below, on several threads, one
# contiguous product and a copy is up to 1.5 times as fast (b = 16), above up to 1.3 times slower.
DIRECT_OUTPUT = 1 << 17


@functools.cache
def choose(num_blocks: int, rank: int, dtype: torch.dtype, device_type: str, tokens: int) -> str:
    """The kernel for inference in a case, a key of SOURCES.

    "lowrank" (b = 1) is two plain products; "small" all three stages in one call, for up to
    SMALL_TOKENS tokens on a CPU; the gradients of "small" come from "numba".  "upcast" is for
    half types that the CPU has no products for.
    """
    if device_type == "cuda" and num_blocks > 1:
        known = dtype in (torch.float32, torch.bfloat16, torch.float16)
        return "triton" if known and find_spec("triton") else "torch"
    if device_type == "cpu":
        from blast_search.kernels import cpu

        if cpu.supports(num_blocks, rank, dtype):
            if tokens <= SMALL_TOKENS:
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
    return _module("cpu" if name in ("numba", "small") else "reference")


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
    if name == "small" and not keep:
        y = _module("small").forward(x, u.contiguous(), s.contiguous(), v.contiguous(), bias)
        return y, None
    if x.is_cpu and emulated(x.dtype):
        wide = choose(len(u), u.shape[2], torch.float32, "cpu", len(x))
        add = None if bias is None else bias.float()
        with torch.autocast("cpu", enabled=False):
            y, z = forward(x.float(), u.float(), s.float(), v.float(), add, wide, keep)
        return y.to(x.dtype), z
    if name == "triton":
        return _module("triton").forward(x, u, s, v, bias=bias), None
    if len(u) == 1 and not keep:
        return low_rank(x, u, s, v, bias), None
    couple: Callable[[Tensor, Tensor], Tensor] = coupling(name).couple
    b, p, _ = u.shape
    tokens, n = x.shape
    s, ut = s.contiguous(), u.mT
    blocks = x.as_strided((b, tokens, n // b), (n // b, x.stride(0), 1))
    y = x.new_empty(tokens, b, p)
    step = CPU_CHUNK if x.is_cpu and not keep else max(tokens, 1)
    z = x.new_empty(b, 0, u.shape[2])
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        z = torch.bmm(blocks[:, rows], v)
        _up(couple(z, s), ut, bias, y[rows])
    return y.view(tokens, b * p), z if keep else None


def _up(w: Tensor, ut: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out_i = w_i U_i^T + bias_i; w (b, T, r), ut (b, r, p), bias (b p), out (T, b, p)."""
    b, p = len(w), ut.shape[2]
    few = torch.get_num_threads() > 1 and out.numel() < DIRECT_OUTPUT
    if few or not w.is_cpu or w.itemsize < 4:
        part = torch.bmm(w, ut).transpose(0, 1)
        out.copy_(part) if bias is None else torch.add(part, bias.view(b, p), out=out)
    elif bias is None:
        torch.bmm(w, ut, out=out.transpose(0, 1))
    else:
        torch.baddbmm(bias.view(b, 1, p), w, ut, out=out.transpose(0, 1))


def low_rank(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """b = 1 as two plain products, the bias within the second; differentiable, any shape of x."""
    z = x @ v.squeeze(0)
    scale = s.view(-1).to(z.dtype)
    z = z * scale if torch.is_grad_enabled() else z.mul_(scale)
    return torch.nn.functional.linear(z, u.squeeze(0), bias)


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

    z is computed again where it was not kept; w always is: a coupling costs less than its memory.
    """
    if name == "triton":
        grads: Gradients = _module("triton").backward(grad, x, u, s, v, needs)
        return grads
    if x.is_cpu and emulated(x.dtype):
        wide = choose(len(u), u.shape[2], torch.float32, "cpu", len(x))
        z = None if z is None else z.float()
        with torch.autocast("cpu", enabled=False):
            found = backward(
                grad.float(), x.float(), u.float(), s.float(), v.float(), z, needs, wide
            )
        dx, du, ds, dv = (None if t is None else t.to(x.dtype) for t in found)
        return dx, du, ds, dv
    module = coupling(name)
    (b, p, _), q = u.shape, v.shape[1]
    tokens = len(x)
    s = s.contiguous()
    blocks = x.view(tokens, b, q).transpose(0, 1)
    g = grad.view(tokens, b, p).transpose(0, 1)
    dw = torch.bmm(g, u)
    du = ds = dx = dv = None
    if needs[1] or needs[2]:
        z = torch.bmm(blocks, v) if z is None else z
        du = torch.bmm(g.transpose(1, 2), module.couple(z, s)) if needs[1] else None
        ds = module.couple_grad(dw, z).to(s.dtype) if needs[2] else None
    if needs[0] or needs[3]:
        dz = module.couple(dw, s.transpose(0, 1).contiguous())
        dx = x.new_empty(x.shape) if needs[0] else None
        if dx is not None:
            _up(dz, v.mT, None, dx.view(tokens, b, q))
        dv = torch.bmm(blocks.transpose(1, 2), dz) if needs[3] else None
    return dx, du, ds, dv
