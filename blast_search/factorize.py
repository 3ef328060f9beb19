"""Dense weight (and the Gram of its inputs) -> BLAST factors.

The objective is || (A - A_hat) G^(1/2) ||_F with G = E[x x^T], the mean squared error of the
layer's output on the calibration data; G = I where no Gram is given.

b = 1 has a closed form: with P the leading eigenvectors of A G A^T, the best rank-r matrix is
P P^T A (the "whitened SVD", without ever inverting G).

b > 1 uses alternating least squares from r x r normal equations.  Every block update moves by
`OMEGA` towards its exact minimiser; each block is a convex quadratic, so any 0 < omega < 2
descends.  The published preconditioned gradient descent (arXiv 2410.21262, algorithm 2) is a
damped form of the same updates from a near-zero start.  Tried and dropped: random starts (1-4 %
worse), Adam (worse at equal time), block-diagonal whitening alone (loses to b = 1 on real
activations; it is only the start here).

Shapes: matrix.py's legend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from blast_search.errors import IncompatibleInputError

OMEGA = 1.7
RIDGE = 1e-3  # of the Gram's mean diagonal: calibration data never spans the whole input space
START_SWEEPS = 8
SWEEPS = 30


@dataclass(frozen=True)
class Factors:
    """U (b, p, r), V (b, q, r), S (b, b, r); error is relative, in the Gram's norm if given."""

    U: Tensor
    V: Tensor
    S: Tensor
    error: float


@dataclass(frozen=True)
class LowRankBasis:
    """The best low-rank factors of one weight at every rank (left: (m, k), right: (n, k))."""

    left: Tensor
    right: Tensor
    energy: Tensor  # (k,), squared singular values in the Gram's norm, descending
    total: float

    def error(self, rank: int) -> float:
        """Relative error of the best rank-`rank` matrix."""
        kept = float(self.energy[:rank].sum())
        return max(0.0, 1 - kept / self.total) ** 0.5 if self.total > 0 else 0.0

    def factors(self, rank: int) -> Factors:
        """The best rank-`rank` matrix as b = 1 factors, zero-padded beyond the weight's rank."""
        u, v = self.left[:, :rank], self.right[:, :rank]
        scale = v.norm(dim=0).clamp_min(torch.finfo(v.dtype).tiny).sqrt()
        u, v = u * scale, v / scale
        if missing := rank - u.shape[1]:
            u, v = (torch.nn.functional.pad(t, (0, missing)) for t in (u, v))
        ones = torch.ones(1, 1, rank, dtype=u.dtype, device=u.device)
        return Factors(u.unsqueeze(0), v.unsqueeze(0), ones, self.error(rank))


def regularised(gram: Tensor) -> Tensor:
    """The Gram with a ridge of `RIDGE` times its mean diagonal.

    Raises:
        IncompatibleInputError: not finite (NaN in the calibration data).
    """
    if not bool(gram.isfinite().all()):
        raise IncompatibleInputError(
            "the Gram of a layer's inputs is not finite: the calibration data or an activation "
            "holds NaN or infinity. Check the calibration batches."
        )
    gram = (gram + gram.T) / 2
    scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    return gram / scale + RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def low_rank_basis(weight: Tensor, gram: Tensor | None = None, max_rank: int = 0) -> LowRankBasis:
    """The whitened SVD of weight (m, n), up to `max_rank` (0: all ranks)."""
    a = weight.double()
    m, n = a.shape
    g = None if gram is None else regularised(gram.double())
    if m <= n:
        energy, left = torch.linalg.eigh(a @ (a.T if g is None else g @ a.T))
    else:
        root = torch.eye(n, dtype=a.dtype, device=a.device) if g is None else _cholesky(g)
        al = a @ root
        energy, right = torch.linalg.eigh(al.T @ al)
        left = al @ right / energy.clamp_min(energy.max() * 1e-14 + 1e-300).sqrt()
    total = float((a * (a if g is None else a @ g)).sum())
    keep = min(max_rank or len(energy), len(energy))
    left = left.flip(1)[:, :keep]
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    return LowRankBasis(
        left.to(dtype), (a.T @ left).to(dtype), energy.flip(0)[:keep].clamp_min(0), total
    )


def factorize(
    weight: Tensor,
    num_blocks: int,
    rank: int,
    gram: Tensor | None = None,
    sweeps: int = SWEEPS,
    basis: LowRankBasis | None = None,
) -> Factors:
    """The BLAST factors of a weight (m, n).

    Args:
        gram: (n, n), E[x x^T] of the layer's inputs, or None for the plain Frobenius error.
        sweeps: alternating passes over U, S and V (b > 1).
        basis: the weight's LowRankBasis where it is at hand (same Gram).

    Returns:
        Factors in the weight's device and float32 (float64 stays); never worse than the best
        rank-`rank` matrix.

    Raises:
        ValueError: num_blocks does not divide both sides, rank < 1, or a Gram of other size.
        IncompatibleInputError: NaN or infinity in the weight or the Gram.
    """
    m, n = weight.shape
    b = num_blocks
    if b < 1 or m % b or n % b:
        raise ValueError(f"num_blocks={b} must divide both sides of the {m} x {n} weight.")
    if rank < 1:
        raise ValueError(f"rank={rank}, expected at least 1.")
    if gram is not None and gram.shape != (n, n):
        raise ValueError(f"gram is {tuple(gram.shape)}, expected ({n}, {n}).")
    if not bool(weight.isfinite().all()):
        raise IncompatibleInputError("the weight holds NaN or infinity.")
    basis = basis or low_rank_basis(weight, gram, rank)
    if b == 1:
        return basis.factors(rank)
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    a = weight.to(dtype)
    g = None if gram is None else regularised(gram.to(dtype))
    svd = _expand(basis.factors(rank), b)
    if g is None:
        state = _alternate(svd, _plain_problem(a, b, None), sweeps)
    else:
        roots = _block_roots(g, b)
        (u, s, v) = svd.factors
        whitened = _State((u, s, roots.transpose(1, 2) @ v))
        (u, s, v) = _alternate(whitened, _plain_problem(a, b, roots), START_SWEEPS).factors
        start = _State((u, s, torch.linalg.solve_triangular(roots.mT, v, upper=True)))
        sweep = _gram_problem(a, b, g, roots)
        # Block-diagonal whitening ignores correlations between blocks: on strongly correlated
        # inputs plain low rank can be the better start.
        if sweep(start, 0).loss > sweep(svd, 0).loss:
            start = svd
        state = _alternate(start, sweep, sweeps)
    (u, s, v), loss = state.factors, state.loss
    u, s, v = _balanced(u, s, v)
    error = (max(0.0, loss) / basis.total) ** 0.5 if basis.total > 0 else 0.0
    return Factors(u, v, s, error)


Triple = tuple[Tensor, Tensor, Tensor]  # U, S, V
Sweep = Callable[["_State", float], "_State"]


@dataclass(frozen=True)
class _State:
    factors: Triple
    loss: float = float("inf")
    products: tuple[Tensor, Tensor] | None = None  # coupled(V), kept for the next sweep


def _expand(low_rank: Factors, b: int) -> _State:
    """The same matrix in b x b blocks: U and V cut into b pieces, all couplings one."""
    r = low_rank.S.shape[-1]
    u = low_rank.U.reshape(b, -1, r)
    v = low_rank.V.reshape(b, -1, r)
    return _State((u, u.new_ones(b, b, r), v))


def _alternate(start: _State, sweep: Sweep, sweeps: int) -> _State:
    """Sweep until the loss stalls; the best state seen is returned, so the loss never rises."""
    best = sweep(start, 0)
    for _ in range(sweeps):
        state = sweep(best, OMEGA)
        if not state.loss < best.loss:  # also NaN: rounding has the last word
            break
        stalled = best.loss - state.loss < 1e-4 * state.loss
        best = state
        if stalled:
            break
    return best


def _cholesky(h: Tensor) -> Tensor:
    """Cholesky factors of (..., r, r) with as much ridge as it takes."""
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
    ridge = 1e-13 if h.dtype == torch.float64 else 1e-6
    for _ in range(5):
        root, info = torch.linalg.cholesky_ex(h + torch.diag_embed(scale * ridge + 0 * diagonal))
        if not bool(info.any()):
            break
        ridge *= 100
    return cast(Tensor, root)


def _solve(h: Tensor, rhs: Tensor) -> Tensor:
    return torch.cholesky_solve(rhs, _cholesky(h))


def _step(old: Tensor, exact: Tensor, omega: float) -> Tensor:
    return torch.lerp(old, exact, omega)


def _outer_sum(s: Tensor, k: Tensor) -> Tensor:
    """sum_j (s_ij s_ij^T) * k_j for s (i, j, r) and k (j, r, r): (i, r, r)."""
    return torch.einsum("ija,jac,ijc->iac", s, k, s)


def _plain_problem(a: Tensor, b: int, roots: Tensor | None) -> Sweep:
    """Frobenius problem of A, or of A_:j L_j with G_jj = L_j L_j^T (block-diagonal whitening)."""
    m, n = a.shape
    blocks = a.reshape(b, m // b, b, n // b).transpose(1, 2)  # (i, j, p, q)
    if roots is not None:
        blocks = blocks @ roots.unsqueeze(0)
    norm = float(blocks.square().sum())

    def sweep(state: _State, omega: float) -> _State:
        u, s, v = state.factors
        k = v.transpose(1, 2) @ v
        for _ in range(1 if omega else 0):
            av = blocks @ v.unsqueeze(0)  # (i, j, p, r)
            h = (u.transpose(1, 2) @ u).unsqueeze(1) * k.unsqueeze(0)
            rhs = torch.einsum("ipa,ijpa->ija", u, av)
            s = _step(s, _solve(h, rhs.unsqueeze(-1)).squeeze(-1), omega)
            rhs = torch.einsum("ijpa,ija->iap", av, s)
            u = _step(u, _solve(_outer_sum(s, k), rhs).transpose(1, 2), omega)
            gram_u = u.transpose(1, 2) @ u
            au = blocks.transpose(2, 3) @ u.unsqueeze(1)  # (i, j, q, r)
            h = gram_u.unsqueeze(1) * k.unsqueeze(0)
            rhs = torch.einsum("jqa,ijqa->ija", v, au)
            s = _step(s, _solve(h, rhs.unsqueeze(-1)).squeeze(-1), omega)
            rhs = torch.einsum("ijqa,ija->jaq", au, s)
            v = _step(v, _solve(_outer_sum(s.transpose(0, 1), gram_u), rhs).transpose(1, 2), omega)
            k = v.transpose(1, 2) @ v
        h = (u.transpose(1, 2) @ u).unsqueeze(1) * k.unsqueeze(0)
        cross = torch.einsum("ipa,ijpa,ija->", u, blocks @ v.unsqueeze(0), s)
        square = torch.einsum("ija,ijac,ijc->", s, h, s)
        return _State((u, s, v), norm - 2 * float(cross) + float(square))

    return sweep


def _block_roots(g: Tensor, b: int) -> Tensor:
    """L_j with G_jj = L_j L_j^T: (b, q, q)."""
    q = len(g) // b
    return _cholesky(torch.stack([g[j * q : (j + 1) * q, j * q : (j + 1) * q] for j in range(b)]))


def _gram_problem(a: Tensor, b: int, g: Tensor, roots: Tensor) -> Sweep:
    """The full-Gram problem: U exact, S exact over j jointly, V Gauss-Seidel over j."""
    m, n = a.shape
    p, q = m // b, n // b
    ag = (a @ g).reshape(b, p, b, q)  # (i, p, j, q)
    norm = float((a * (a @ g)).sum())
    gb = g.reshape(b, q, b, q)

    def coupled(v: Tensor) -> tuple[Tensor, Tensor]:
        """K_jl = V_j^T G_jl V_l as (j, l, r, r), and (A G)_ij V_j as (i, j, p, r)."""
        gv = torch.einsum("jqls,lsc->ljqc", gb, v)
        k = torch.einsum("jqa,ljqc->jlac", v, gv)
        return k, torch.einsum("ipjq,jqa->ijpa", ag, v)

    def row_gram(s_i: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("ja,jlac,lc->ac", s_i, k, s_i)

    def sweep(state: _State, omega: float) -> _State:
        u, s, v = state.factors
        r = v.shape[-1]
        k, agv = state.products or coupled(v)
        if omega:
            gram_u = u.transpose(1, 2) @ u
            rhs = torch.einsum("ipa,ijpa->ija", u, agv)
            kk = k.permute(0, 2, 1, 3)  # (j, a, l, c)
            exact = torch.stack(
                [
                    _solve(
                        (kk * gram_u[i][None, :, None, :]).reshape(b * r, b * r),
                        rhs[i].reshape(b * r, 1),
                    ).reshape(b, r)
                    for i in range(b)
                ]
            )
            s = _step(s, exact, omega)
            h = torch.stack([row_gram(s[i], k) for i in range(b)])
            rhs = torch.einsum("ijpa,ija->iap", agv, s)
            u = _step(u, _solve(h, rhs).transpose(1, 2), omega)
            gram_u = u.transpose(1, 2) @ u
            # c_lj = M_l^T M_j with M_j = stack_i U_i diag(s_ij)
            c = torch.einsum("ila,iac,ijc->ljac", s, gram_u, s)
            am = torch.einsum("ipjq,ipa,ija->jqa", ag, u, s)
            v = v.clone()
            for j in range(b):
                rest = am[j] - torch.einsum("qls,lsa,lac->qc", gb[j], v, c[:, j])
                move = torch.cholesky_solve(rest, roots[j])
                v[j] += omega * _solve(c[j, j], move.T).T
            k, agv = coupled(v)
        cross = torch.einsum("ipa,ijpa,ija->", u, agv, s)
        h = torch.stack([row_gram(s[i], k) for i in range(b)])
        square = float((u * (u @ h)).sum())
        return _State((u, s, v), norm - 2 * float(cross) + square, (k, agv))

    return sweep


def _balanced(u: Tensor, s: Tensor, v: Tensor) -> Triple:
    """Equal norms of U and V per component, S of unit root mean square, largest first.

    The matrix does not change; training with one learning rate needs factors of one scale.
    """
    tiny = torch.finfo(u.dtype).tiny ** 0.25
    nu, nv = (t.norm(dim=(0, 1)).clamp_min(tiny) for t in (u, v))
    ns = s.square().mean((0, 1)).sqrt().clamp_min(tiny)
    size = (nu * nv * ns).sqrt()
    order = size.argsort(descending=True)
    u, v, s = u * (size / nu), v * (size / nv), s / ns
    return u[..., order].contiguous(), s[..., order].contiguous(), v[..., order].contiguous()
