"""The BLAST product as two batched matrix products with the coupling step in between.

    z_j = x_j V_j      w_i = sum_j s_ij * z_j      y_i = w_i U_i^T + bias_i

The coupling decides whether BLAST is fast: memory-bound, b^2 T r multiply-adds.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from blast_search.kernels.kept import work_space

Needs = tuple[bool, bool, bool, bool]  # which gradients are wanted: x, u, s, v
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# Numbers of z (and of w) per pass on the CPU.  z holds b times as many as a low-rank layer's, and
# beyond a few megabytes fresh memory costs more than the arithmetic: at b = 16, T = 512, passes
# in kept memory are 2.5 to 3 times as fast as one.  Passes below MIN_PASS tokens never pay.
PASS_NUMBERS = 400_000
MIN_PASS = 32

# From so many output numbers on, writing through a stride pays on several threads: below, one
# contiguous product and a copy is up to 1.5 times as fast (b = 16), above up to 1.3 times slower.
DIRECT_OUTPUT = 1 << 17


class Coupling(Protocol):
    """A module with the coupling step: cpu.py or reference.py."""

    def couple(self, z: Tensor, s: Tensor, out: Tensor | None = None) -> Tensor: ...

    def couple_grad(self, g: Tensor, z: Tensor) -> Tensor: ...


def forward(
    x: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    bias: Tensor | None,
    module: Coupling,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """y (T, m), and z (b, T, r) for `backward` if `keep`."""
    b, p, r = u.shape
    tokens, n = x.shape
    s, ut = s.contiguous(), u.mT
    blocks = x.as_strided((b, tokens, n // b), (n // b, x.stride(0), 1))
    result = x.new_empty(tokens, b * p)  # no view: an autograd function could not return one
    y = result.view(tokens, b, p)
    if keep or not x.is_cpu:
        z = torch.bmm(blocks, v)
        _up(module.couple(z, s), ut, bias, y)
        return result, z if keep else None
    step = max(MIN_PASS, PASS_NUMBERS // (b * r))
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        part, out = (blocks, y) if tokens <= step else (blocks[:, rows], y[rows])
        shape, strides = (b, len(out), r), (len(out) * r, r, 1)
        space = work_space(2 * b * len(out) * r, x.dtype)
        z, w = (space.as_strided(shape, strides, k * b * len(out) * r) for k in (0, 1))
        torch.bmm(part, v, out=z)
        _up(module.couple(z, s, w), ut, bias, out)
    return result, None


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


def low_rank(x: Tensor, u: Tensor, s: Tensor | None, v: Tensor, bias: Tensor | None) -> Tensor:
    """b = 1 as two plain products, the bias within the second; differentiable, any shape of x.

    s: None for couplings of one.
    """
    z = x @ v.squeeze(0)
    if s is not None:
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
    module: Coupling,
) -> Gradients:
    """Gradients for x, u, s, v where needed.

    w is computed again: a coupling costs less than its memory.
    """
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
