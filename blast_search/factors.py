"""The factors of a weight, their one normal form, and their true error.  Shapes: matrix.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blast_search.matrix import to_dense

Triple = tuple[Tensor, Tensor, Tensor]  # U, S, V


@dataclass(frozen=True)
class Factors:
    """U (b, p, r), V (b, q, r), S (b, b, r); error is relative, in the Gram's norm if given."""

    U: Tensor
    V: Tensor
    S: Tensor
    error: float


def check_blocks(weight: Tensor, num_blocks: int) -> None:
    """Raise ValueError unless num_blocks divides both sides of a weight (m, n)."""
    m, n = weight.shape
    if num_blocks < 1 or m % num_blocks or n % num_blocks:
        raise ValueError(
            f"num_blocks={num_blocks} must divide both sides of the {m} x {n} weight."
        )


def relative_error(weight: Tensor, factors: Triple, gram: Tensor | None) -> float:
    """|| (A - A_hat) G^(1/2) ||_F / || A G^(1/2) ||_F from the dense residual, in float64.

    The sweeps' own loss comes from a difference of large sums; this is what gets reported.

    Args:
        gram: G (n, n), or its diagonal (n,); None for the identity.
    """
    a, g = weight.double(), None if gram is None else gram.to(weight.device, torch.float64)
    u, s, v = (t.double() for t in factors)
    e = a - to_dense(u, s, v)

    def squared(t: Tensor) -> Tensor:
        return ((t if g is None else t * g if g.dim() == 1 else t @ g) * t).sum()

    lost, total = squared(e), squared(a)
    return float((lost.clamp_min(0) / total).sqrt()) if float(total) > 0 else float(lost > 0)


def balanced(factors: Triple) -> Triple:
    """Equal norms of U and V per component, S of unit root mean square, largest first.

    The matrix does not change; training with one learning rate needs factors of one scale.
    """
    u, s, v = factors
    tiny = torch.finfo(u.dtype).tiny ** 0.25
    nu, nv = (t.norm(dim=(0, 1)).clamp_min(tiny) for t in (u, v))
    ns = s.square().mean((0, 1)).sqrt().clamp_min(tiny)
    size = (nu * nv * ns).sqrt()
    order = size.argsort(descending=True)
    u, v, s = u * (size / nu), v * (size / nv), s / ns
    return u[..., order].contiguous(), s[..., order].contiguous(), v[..., order].contiguous()
