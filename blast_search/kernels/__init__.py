"""The BLAST product and its gradients, one signature, several implementations.

    forward(x, u, s, v, bias, name, keep) -> (y, z)      x (T, n)   y (T, m)
    backward(grad, x, u, s, v, z, needs, name) -> (dx, du, ds, dv)

`choose` names the implementation for a case; the name, with a hash of its source, is part of a
latency cell's key, so a latency measured with one kernel is never used for another.

"triton" (kernels/triton.py) has a forward and a backward of its own.  The others are two batched
matrix products with the coupling step in between:

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
    "triton": ("__init__.py", "triton.py", "triton_kernels.py", "triton_tune.py"),
}

# Tokens per pass on the CPU: z and w of one pass stay in the cache.
CPU_CHUNK = 512

# Up to so many tokens, one compiled call for all three stages beats three PyTorch calls.
SMALL_TOKENS = 16


@functools.cache
def choose(num_blocks: int, rank: int, dtype: torch.dtype, device_type: str, tokens: int) -> str:
    """The kernel for inference in a case, a key of SOURCES.

    "lowrank" (b = 1) is two plain products; "small" all three stages in one call, for up to
    SMALL_TOKENS tokens on a CPU; the gradients of "small" come from "numba".
    """
    if device_type == "cuda" and num_blocks > 1:
        known = dtype in (torch.float32, torch.bfloat16, torch.float16)
        return "triton" if known and find_spec("triton") else "torch"
    if device_type == "cpu":
        from blast_search.kernels import cpu

        if cpu.supports(num_blocks, rank, dtype):
            if tokens <= SMALL_TOKENS:
                return "small"
            if num_blocks > 1:
                return "numba"
    return "lowrank" if num_blocks == 1 else "torch"


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
    if name == "triton":
        return _module("triton").forward(x, u, s, v, bias=bias), None
    if len(u) == 1 and not keep:
        return low_rank(x, u, s, v, bias), None
    couple: Callable[[Tensor, Tensor], Tensor] = coupling(name).couple
    b, p, _ = u.shape
    tokens, n = x.shape
    s, ut = s.contiguous(), u.mT
    blocks = x.as_strided((b, tokens, n // b), (n // b, x.stride(0), 1))
    z = None
    if keep or tokens <= CPU_CHUNK or x.device.type != "cpu":
        z = torch.bmm(blocks, v)
        y = _joined(torch.bmm(couple(z, s), ut), bias, None)
    else:
        y = x.new_empty(tokens, b, p)
        for start in range(0, tokens, CPU_CHUNK):
            rows = slice(start, start + CPU_CHUNK)
            part = torch.bmm(couple(torch.bmm(blocks[:, rows], v), s), ut)
            _joined(part, bias, y[rows])
    return y.view(tokens, b * p), z if keep else None


def low_rank(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """b = 1 as two plain products, the bias within the second; differentiable, any shape of x."""
    z = x @ v.squeeze(0)
    scale = s.view(-1).to(z.dtype)
    z = z * scale if torch.is_grad_enabled() else z.mul_(scale)
    return torch.nn.functional.linear(z, u.squeeze(0), bias)


def _joined(part: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """(b, T, p) -> (T, b, p), the bias added on the way."""
    b, tokens, p = part.shape
    if out is None:
        out = part.new_empty(tokens, b, p)
    if bias is None:
        return out.copy_(part.transpose(0, 1))
    return torch.add(part.transpose(0, 1), bias.view(b, p), out=out)


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
            dx.view(tokens, b, q).copy_(torch.bmm(dz, v.transpose(1, 2)).transpose(0, 1))
        dv = torch.bmm(blocks.transpose(1, 2), dz) if needs[3] else None
    return dx, du, ds, dv
