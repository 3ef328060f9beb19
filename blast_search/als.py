"""Alternating least squares with over-relaxation, batched over layers of one shape.

Loss: || (A - A_hat) G^(1/2) ||_F^2, with G block-diagonal or I (`BlockProblem`) or any Gram
(`FullProblem`).  The published updates (arXiv 2410.21262, algorithm 2) at damping 0 and step 1
are the exact minimisers of one factor with the others fixed; here each step goes omega times as
far.  Each factor's problem is a convex quadratic, so any 0 < omega < 2 descends, also when the
solve is damped or cut short.  A last sweep at omega = 1 takes what over-relaxation left over.

A_hat is never built: what is needed of A are the products A_ij V_j and A_ij^T U_i, and the r x r
normal matrices are Hadamard products of U_i^T U_i and V_j^T V_j.  Updates are solved in residual
form, x += omega H^-1 (rhs - H x): rounding and ridge then slow a step down, but never bias it.

Tried on real weights and dropped: momentum across sweeps (with omega 1.3 as good as omega 1.9
alone, but needs restarts), a second S step per sweep (at b = 16 half as much time again for a
worse fit), omega going linearly to 0 as published (3 % worse at 30 sweeps), conjugate gradients
for U's and V's systems (no faster than Cholesky up to r = 152; for the couplings, with a single
right-hand side each, they are as good as an exact solve and faster, on GPUs many times).

Letters in einsum and comments: l layer; i, j block row and column; p, q row and column in a
block; a, c component.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from blast_search.factors import Triple
from blast_search.gram import diagonal_blocks
from blast_search.spd import cholesky, conjugate_gradients, solve, unit_scales

OMEGA = 1.9  # 1.7 is 0.5 to 2 % worse at 30 sweeps, 1.95 up to 1 % at 10
FULL_OMEGA = 1.7  # V goes block by block there: 1.9 is 1 to 2 % worse
CG_STEPS = 6  # for couplings: as good per sweep as the exact solve; 3 are not
FLOOR = 1e-5  # relative squared error at which float32 sums stop telling better from worse
STALL = 1e-5  # relative decrease per sweep that ends a fit; the SVD start is a plateau: not 1e-4
START_SWEEPS = 8  # on the Gram's diagonal blocks, before the full Gram
# Numbers in a temporary, where one block row leaves the choice: within a CPU's cache; on a GPU few
# launches, as small ones cost the same.
ROOM = {"cpu": 1 << 18, "cuda": 1 << 26}
RACE_SWEEPS = 2  # for choosing between two starts

OnSweep = Callable[[Tensor], None]  # gets the relative squared errors (l,)


@dataclass(frozen=True)
class State:
    """u (l, b, p, r), s (l, b, b, r), v (l, b, q, r), V's products with A and G, loss (l,)."""

    tensors: tuple[Tensor, ...]
    loss: Tensor

    def where(self, mask: Tensor, other: State) -> State:
        """Per layer: self where the mask (l,) holds, else other."""
        if bool(mask.all()):
            return self
        pairs = zip(self.tensors, other.tensors, strict=True)
        chosen = tuple(torch.where(_wide(mask, x), x, y) for x, y in pairs)
        return State(chosen, torch.where(mask, self.loss, other.loss))


class BlockProblem:
    """A (l, m, n) under no Gram, or a block-diagonal one: fit A_:j L_j, G_jj = L_j L_j^T."""

    omega = OMEGA

    def __init__(self, a: Tensor, b: int, roots: Tensor | None = None) -> None:
        self.b, self.roots = b, roots
        columns = torch.unflatten(a, 2, (b, -1)).transpose(1, 2)  # (l, j, m, q)
        self.columns = (columns if roots is None else columns @ roots).contiguous()
        by_row = torch.unflatten(self.columns, 2, (b, -1)).permute(
            0, 2, 1, 4, 3
        )  # (l, i, j, q, p)
        self.rows = by_row.flatten(2, 3).contiguous()  # (l, i, n, p): A_i: transposed
        self.norm = self.columns.square().sum((1, 2, 3), dtype=torch.float64)

    def times_v(self, v: Tensor) -> Tensor:
        """A_ij V_j as (l, j, i, p, r)."""
        return torch.unflatten(self.columns @ v, 2, (self.b, -1))

    def times_u(self, u: Tensor) -> Tensor:
        """A_ij^T U_i as (l, i, j, q, r)."""
        return torch.unflatten(self.rows @ u, 2, (self.b, -1))

    def start(self, factors: Triple) -> State:
        u, s, v = factors
        return self.evaluate(u, s, v if self.roots is None else self.roots.mT @ v)

    def factors(self, state: State) -> Triple:
        u, s, v = state.tensors[:3]
        if self.roots is not None:
            v = torch.linalg.solve_triangular(self.roots.mT, v, upper=True)
        return u, s, v

    def evaluate(self, u: Tensor, s: Tensor, v: Tensor) -> State:
        """||A||^2 - 2 <A_hat, A> + ||A_hat||^2."""
        av = self.times_v(v)
        h = _mix(s, v.mT @ v)
        return State((u, s, v, av), _loss(self.norm, u, s, h, av))

    def sweep(self, state: State, omega: Tensor) -> State:
        u, s, v, av = state.tensors
        gram_u, gram_v = u.mT @ u, v.mT @ v
        # H_ij = (U_i^T U_i) * (V_j^T V_j), in variables that give it a unit diagonal.
        scale_u, scale_v = unit_scales(gram_u), unit_scales(gram_v)  # (l, b, r)
        unit_u = gram_u * scale_u[..., None] * scale_u[..., None, :]
        unit_v = gram_v * scale_v[..., None] * scale_v[..., None, :]
        scale = scale_u.unsqueeze(2) * scale_v.unsqueeze(1)  # (l, i, j, r)
        dots = (av * u.unsqueeze(1)).sum(3).transpose(1, 2) * scale
        scaled = s / scale
        moves = []
        for i in _chunks(self.b, unit_v):
            h = unit_u[:, i, None] * unit_v[:, None]
            rest = dots[:, i, ..., None] - h @ scaled[:, i, ..., None]
            move = conjugate_gradients(h.flatten(0, 2), rest.flatten(0, 2), CG_STEPS)
            moves.append(move.view_as(scaled[:, i]))
        move = torch.cat(moves, 1)
        s = s + omega * scale * move
        u = _step(u, _mix(s, gram_v), (av * s.transpose(1, 2).unsqueeze(3)).sum(1), omega)
        rhs = (self.times_u(u) * s.unsqueeze(3)).sum(1)
        v = _step(v, _mix(s.transpose(1, 2), u.mT @ u), rhs, omega)
        return self.evaluate(u, s, v)


class FullProblem:
    """A (l, m, n) under a full Gram (l, n, n): V_j and S couple across j.

    U is exact; each s_i: (all j jointly, b r unknowns) takes `CG_STEPS` of conjugate gradients;
    V goes block by block.  Holds K_jk = V_j^T G_jk V_k: b^2 r^2 numbers per layer.
    """

    omega = FULL_OMEGA

    def __init__(self, a: Tensor, b: int, g: Tensor, roots: Tensor) -> None:
        ag = a @ g
        self.b, self.roots = b, roots
        self.products = BlockProblem(ag, b)
        self.g = torch.unflatten(g, 2, (b, -1)).transpose(1, 2).contiguous()  # (l, j, n, q): G_:j
        self.norm = (a * ag).sum((1, 2), dtype=torch.float64)

    def start(self, factors: Triple) -> State:
        return self.evaluate(*factors)

    def factors(self, state: State) -> Triple:
        return cast(Triple, state.tensors[:3])

    def coupled(self, v: Tensor) -> Tensor:
        """K_jk = V_j^T G_jk V_k as (l, j, a, k, c)."""
        gv = torch.unflatten(self.g @ v, 2, (self.b, -1))  # (l, k, j, q, r)
        return torch.unflatten(v.mT @ gv.permute(0, 2, 3, 1, 4).flatten(3), 3, (self.b, -1))

    def row_gram(self, s: Tensor, k: Tensor) -> Tensor:
        """Vbar_i G Vbar_i^T as (l, i, r, r)."""
        rows = []
        for i in _chunks(self.b, k):
            row = s[:, i]  # (l, i, j, r)
            inner = (k[:, None] * row[:, :, None, None]).sum(4)  # over k: (l, i, j, a, c)
            rows.append((inner * row[..., None]).sum(2))
        return torch.cat(rows, 1)

    def evaluate(self, u: Tensor, s: Tensor, v: Tensor) -> State:
        k, agv = self.coupled(v), self.products.times_v(v)
        return State((u, s, v, agv, k), _loss(self.norm, u, s, self.row_gram(s, k), agv))

    def sweep(self, state: State, omega: Tensor) -> State:
        u, s, v, agv, k = state.tensors
        gram_u = u.mT @ u
        dots = (agv * u.unsqueeze(1)).sum(3).transpose(1, 2)
        moves = []
        for i in _chunks(self.b, k):
            h = k[:, None] * gram_u[:, i, None, :, None, :]  # (l, i, j, a, k, c)
            h = h.flatten(4).flatten(2, 3)  # (l, i, b r, b r)
            rest = dots[:, i].flatten(2)[..., None] - h @ s[:, i].flatten(2)[..., None]
            move = conjugate_gradients(h.flatten(0, 1), rest.flatten(0, 1), CG_STEPS)
            moves.append(move.reshape(s[:, i].shape))
        s = s + omega * torch.cat(moves, 1)
        rhs = (agv * s.transpose(1, 2).unsqueeze(3)).sum(1)
        u = _step(u, self.row_gram(s, k), rhs, omega)
        gram_u = u.mT @ u
        rhs = (self.products.times_u(u) * s.unsqueeze(3)).sum(1)  # (l, j, q, r)
        v = v.clone()
        for j in range(self.b):
            # C_kj = M_k^T M_j with M_j = stack_i U_i diag(s_ij)
            c = torch.einsum("lika,liac->lkac", s, gram_u * s[:, :, j, None])
            rest = rhs[:, j] - self.g[:, j].mT @ (v @ c).flatten(1, 2)
            move = solve(c[:, j], torch.cholesky_solve(rest, self.roots[:, j]).mT).mT
            v[:, j] += omega.squeeze(1) * move
        return self.evaluate(u, s, v)


def fit(
    a: Tensor,
    b: int,
    starts: Sequence[Triple],
    gram: Tensor | None,
    full: bool,
    sweeps: int,
    on_sweep: OnSweep | None = None,
    rough: bool = True,
) -> tuple[Triple, Tensor]:
    """Fit weights a (l, m, n) under Grams (l, n, n) or None, from the best of `starts`.

    Args:
        starts: factors with a leading l; each gets `RACE_SWEEPS`, the best per layer goes on.
        full: whether the Gram is more than block-diagonal.
        rough: with a full Gram, also start from a fit to its diagonal blocks.

    Returns:
        The factors, never worse than any start, and which layers (l,) are out of the precision's
        reach: at `FLOOR`, or a sweep failed to descend (Grams with a few huge eigenvalues).
    """
    roots = None if gram is None else cholesky(diagonal_blocks(gram, b), 0.0)
    problem: BlockProblem | FullProblem = BlockProblem(a, b, roots)
    if full and gram is not None and roots is not None:
        starts = list(starts)
        if rough:
            # The better start on most real layers, even where its own loss is the higher one;
            # on strongly correlated inputs the low-rank start wins.
            state, _ = alternate(problem, problem.start(starts[0]), START_SWEEPS)
            starts.append(problem.factors(state))
        problem = FullProblem(a, b, gram, roots)
    states = [problem.start(start) for start in starts]
    if len(states) > 1:
        race = min(RACE_SWEEPS, sweeps)
        states = [alternate(problem, state, race)[0] for state in states]
        sweeps -= race
    best = states[0]
    for state in states[1:]:
        best = state.where(state.loss < best.loss, best)
    best, failed = alternate(problem, best, sweeps, on_sweep)
    return problem.factors(best), failed | ~(best.loss > FLOOR * problem.norm)


def alternate(
    problem: BlockProblem | FullProblem,
    best: State,
    sweeps: int,
    on_sweep: OnSweep | None = None,
) -> tuple[State, Tensor]:
    """Sweep until all layers stall; the best state seen is kept, so no layer's loss ever rises.

    Each layer's last sweep is at omega = 1.  In float32, layers also stop at `FLOOR`.

    Returns:
        The best state, and which layers (l,) stopped because an over-relaxed sweep failed.
    """
    floor = 0 if best.tensors[0].dtype == torch.float64 else FLOOR * problem.norm
    last = torch.zeros_like(best.loss, dtype=torch.bool)  # this sweep ends the layer's fit
    failed = last
    done = best.loss < floor
    for sweep in range(sweeps):
        last = last | (sweep == sweeps - 1)
        omega = torch.where(last, 1.0, problem.omega).to(best.tensors[0].dtype)
        state = problem.sweep(best, omega[:, None, None, None])
        better = (state.loss < best.loss) & ~done  # false for NaN: rounding has the last word
        failed = failed | ~(better | done | last)
        gain = torch.where(better, best.loss - state.loss, 0)
        best = state.where(better, best)
        if on_sweep:
            on_sweep(torch.clamp(best.loss, min=floor) / problem.norm)
        done = done | last | (best.loss < floor)
        last = last | (gain < STALL * best.loss)
        if bool(done.all()):
            break
    return best, failed


def _step(x: Tensor, h: Tensor, rhs: Tensor, omega: Tensor) -> Tensor:
    """x (l, b, p, r) moved by omega towards rhs h^-1."""
    return x + omega * solve(h, (rhs - x @ h).mT).mT


def _mix(s: Tensor, k: Tensor) -> Tensor:
    """sum_j (s_ij s_ij^T) * k_j for s (l, i, j, r) and k (l, j, r, r): (l, i, r, r)."""
    b = s.shape[2]
    if len(_chunks(b, k)) == 1:  # a few launches; beyond the cache up to 5x as slow as the loop
        return (s[..., None] * k[:, None] * s[..., None, :]).sum(2)
    total = s.new_zeros(*s.shape[:2], *k.shape[2:])
    for i in _chunks(s.shape[1], k[:, 0]):
        for j in range(b):
            left = k[:, j, None] * s[:, i, j, :, None]
            total[:, i].addcmul_(left, s[:, i, j, None])
    return total


def _chunks(count: int, one: Tensor) -> list[slice]:
    """Slices of 0 .. count, so that tensors of so many times `one` have room."""
    room = ROOM.get(one.device.type, ROOM["cpu"])
    step = min(count, max(1, room // one.numel()))
    return [slice(first, min(count, first + step)) for first in range(0, count, step)]


def _loss(norm: Tensor, u: Tensor, s: Tensor, h: Tensor, av: Tensor) -> Tensor:
    rhs = (av * s.transpose(1, 2).unsqueeze(3)).sum(1)
    cross = (rhs * u).sum((1, 2, 3), dtype=torch.float64)
    return norm - 2 * cross + (u.mT @ u * h).sum((1, 2, 3), dtype=torch.float64)


def _wide(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (x.dim() - 1))
