"""Gradient methods, kept as references: the published PrecGD, and Adam.

For the same error, PrecGD needs about 10 times the time of als.py and more, Adam about 3 times
(benchmarks/factorize.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from blast_search.factors import Triple
from blast_search.matrix import to_dense
from blast_search.spd import solve

PRECGD_SWEEPS = ADAM_SWEEPS = 300
DELTA = 0.1  # damping relative to the residual's norm
INIT = 0.001
ADAM_RATE = 0.03  # of a weight scaled to unit variance; decays linearly to 0

OnStep = Callable[[float], None]  # gets the relative squared error


def precgd(
    weight: Tensor,
    num_blocks: int,
    rank: int,
    sweeps: int = PRECGD_SWEEPS,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Triple:
    """Preconditioned gradient descent as published (arXiv 2410.21262, algorithm 2).

    The weight (m, n) is scaled to unit variance.  U, V start at 0.001 / sqrt(r) N(0, 1), S at
    N(0, 1).  One sweep steps U, then V, then S against (Hessian + delta I)^-1 gradient; residual
    and delta = 0.1 ||A - A_hat||_F are recomputed before each.  The authors' loss is
    ||A - A_hat||_F^2 without the usual 1/2 at a rate 1 -> 0, so the step goes from 2 to 0: a step
    from 1 to 0 is a slower method.

    Returns:
        U (b, p, r), S (b, b, r), V (b, q, r): the last iterate, whatever its error.
    """
    b, r = num_blocks, rank
    m, n = weight.shape
    p, q = m // b, n // b
    scale = _scale(weight)
    a = weight / scale
    generator = torch.Generator().manual_seed(seed)
    u, v, s = (
        (torch.randn(*shape, generator=generator) * size).to(a)
        for shape, size in (
            ((b, p, r), INIT / math.sqrt(r)),
            ((b, q, r), INIT / math.sqrt(r)),
            ((b, b, r), 1.0),
        )
    )
    eye = torch.eye(r, dtype=a.dtype, device=a.device)
    norm = a.norm()

    def residual() -> tuple[Tensor, Tensor]:
        e = to_dense(u, s, v) - a
        return e, DELTA * e.norm() * eye

    for sweep in range(sweeps):
        step = 2 * (1 - sweep / sweeps)
        e, damping = residual()
        bars = (s.unsqueeze(2) * v.unsqueeze(0)).reshape(b, n, r)  # Vbar_i^T
        gradient = e.reshape(b, p, n) @ bars
        u = u - step * solve(bars.mT @ bars + damping, gradient.mT, 0.0).mT
        e, damping = residual()
        bars = (s.unsqueeze(2) * u.unsqueeze(1)).transpose(0, 1).reshape(b, m, r)  # Ubar_j
        gradient = e.reshape(m, b, q).permute(1, 2, 0) @ bars
        v = v - step * solve(bars.mT @ bars + damping, gradient.mT, 0.0).mT
        e, damping = residual()
        blocks = e.reshape(b, p, b, q).transpose(1, 2)
        diagonal = (blocks @ v.unsqueeze(0) * u.unsqueeze(1)).sum(2)  # diag(U_i^T E_ij V_j)
        h = (u.mT @ u).unsqueeze(1) * (v.mT @ v).unsqueeze(0) + damping
        s = s - step * solve(h, diagonal.unsqueeze(-1), 0.0).squeeze(-1)
        if on_step:
            on_step(float((residual()[0].norm() / norm).square()))
    return u, s * scale, v


def adam(
    weight: Tensor,
    start: Triple,
    gram: Tensor | None = None,
    sweeps: int = ADAM_SWEEPS,
    on_step: OnStep | None = None,
) -> Triple:
    """Adam on the factors from `start`; returns the best iterate.  The Gram (n, n) may be full."""
    scale = _scale(weight)
    a = weight / scale
    u, s, v = start
    # One learning rate for all three: components of one size in U and V, the scale in both.
    parameters = [t.detach().clone().requires_grad_() for t in (u / scale**0.5, s, v / scale**0.5)]
    optimiser = torch.optim.Adam(parameters, lr=ADAM_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1e-3, sweeps)
    norm = float(((a if gram is None else a @ gram) * a).sum()) or 1.0
    best, kept = math.inf, start
    with torch.enable_grad():
        for sweep in range(sweeps + 1):
            u, s, v = parameters
            e = to_dense(u, s, v) - a
            loss = ((e if gram is None else e @ gram) * e).sum() / norm
            value = float(loss.detach())
            if value < best:
                best = value
                root = scale**0.5
                kept = (u.detach() * root, s.detach().clone(), v.detach() * root)
            if on_step and sweep:
                on_step(best)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return kept


def _scale(weight: Tensor) -> Tensor:
    scale = weight.std() if weight.numel() > 1 else weight.abs().max()
    return torch.where(scale > 0, scale, torch.ones_like(scale))
