"""Structured matrices that BLAST contains, fitted in closed form: what it is compared with.

Each function returns BLAST factors that hold the structure exactly, so they run in a BlastLinear,
and the number of parameters that the structure needs in its own form.  Which couplings make which
structure: arXiv 2410.21262, section 2.  Shapes: matrix.py's legend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blast_search.factors import Factors, Triple, check_blocks, relative_error
from blast_search.gram import cut, diagonal_blocks, regularised
from blast_search.lowrank import whitened_svd

MONARCH_SWEEPS = 10  # over block columns, under a full Gram


@dataclass(frozen=True)
class Structured:
    """BLAST factors of a structured matrix; parameters of its native form, without bias."""

    factors: Factors
    parameters: int


@torch.no_grad()
def low_rank(
    weight: Tensor, rank: int, gram: Tensor | None = None, num_blocks: int = 1
) -> Structured:
    """The best rank-`rank` matrix (whitened SVD), as b x b blocks with all couplings one.

    Args:
        weight: (m, n).  gram: (n, n), (n,) or None, as for factorize; regularised here.
    """
    a, g = _prepared(weight, num_blocks, gram)
    f = whitened_svd(a, g, rank).factors(rank, num_blocks)
    return _structured(weight, gram, (f.U, f.S, f.V), rank * sum(weight.shape))


@torch.no_grad()
def block_diagonal(weight: Tensor, num_blocks: int, gram: Tensor | None = None) -> Structured:
    """The best matrix with dense blocks A_ii and zeros elsewhere: m n / b parameters.

    Under a Gram the blocks take over what the zeros lose: D_i = (A G)_ii G_ii^-1, the regression
    of the block row's output on its own inputs.  BLAST rank min(p, q), s_ij = 1 where i = j.
    """
    a, g = _prepared(weight, num_blocks, gram)
    b = num_blocks
    p, q = a.shape[0] // b, a.shape[1] // b
    blocks = _own_blocks(a if g is None else a @ g, b)  # (b, p, q)
    if g is not None:
        roots = torch.linalg.cholesky(diagonal_blocks(g, b))
        blocks = torch.cholesky_solve(blocks.mT, roots).mT
    eye = torch.eye(min(p, q), dtype=a.dtype, device=a.device).expand(b, -1, -1)
    u, v = (eye, blocks.mT) if p <= q else (blocks, eye)
    s = torch.eye(b, dtype=a.dtype, device=a.device).unsqueeze(2).expand(b, b, min(p, q))
    return _structured(weight, gram, (u, s, v), blocks.numel())


@torch.no_grad()
def monarch(
    weight: Tensor, num_blocks: int, block_rank: int, gram: Tensor | None = None
) -> Structured:
    """Every block A_ij of rank t on its own (Monarch, block low rank): b^2 t (p + q) parameters.

    Without a Gram, or with a block-diagonal one, the blocks decouple and each takes its
    (whitened) SVD: exact.  A full Gram couples the blocks of a row: from there, `MONARCH_SWEEPS`
    passes over the block columns, each block set to its minimiser with the others fixed (a
    reduced-rank regression, in closed form), so the error never rises.

    BLAST rank b t: component slot k = (i + j) mod b of U_i and V_j belongs to block (i, j).

    Raises:
        ValueError: block_rank outside 1 .. min(p, q).
    """
    a, g = _prepared(weight, num_blocks, gram)
    b, t = num_blocks, block_rank
    p, q = a.shape[0] // b, a.shape[1] // b
    if not 1 <= t <= min(p, q):
        raise ValueError(f"block_rank={t}, expected 1 to {min(p, q)}.")
    targets = a.reshape(b, p, b, q).permute(2, 0, 1, 3)  # (j, i, p, q)
    grams = None if g is None else diagonal_blocks(g, b)
    left, right = _truncate(targets, grams, t)
    block = None if g is None else cut(g, "block", b)
    if g is not None and grams is not None and block is not None and not torch.equal(g, block):
        roots = torch.linalg.cholesky(grams)
        columns = g.reshape(b, q, b * q)  # G_j:
        dense = left @ right.mT
        eg = (a - dense.permute(1, 2, 0, 3).reshape(a.shape)) @ g
        for _ in range(MONARCH_SWEEPS):
            for j in range(b):
                own = eg.reshape(b * p, b, q)[:, j]
                free = torch.cholesky_solve(own.mT, roots[j]).mT.reshape(b, p, q) + dense[j]
                left[j], right[j] = _truncate(free, grams[j], t)
                new = left[j] @ right[j].mT
                eg -= (new - dense[j]).reshape(b * p, q) @ columns[j]
                dense[j] = new
    u = a.new_zeros(b, p, b, t)
    v = a.new_zeros(b, q, b, t)
    s = a.new_zeros(b, b, b, t)
    for i in range(b):
        for j in range(b):
            slot = (i + j) % b
            u[i, :, slot], v[j, :, slot], s[i, j, slot] = left[j, i], right[j, i], 1
    return _structured(
        weight, gram, (u.flatten(2), s.flatten(2), v.flatten(2)), b * b * t * (p + q)
    )


def _truncate(blocks: Tensor, gram: Tensor | None, t: int) -> tuple[Tensor, Tensor]:
    """Best rank-t L R^T of blocks (..., i, p, q) under Grams (..., q, q), shared by all i."""
    g = None if gram is None else gram.unsqueeze(-3)
    if blocks.shape[-2] <= blocks.shape[-1]:
        weighted = blocks if g is None else blocks @ g
        left = torch.linalg.eigh(blocks @ weighted.mT)[1][..., -t:]
        return left, blocks.mT @ left
    root = None if g is None else torch.linalg.cholesky(g)
    white = blocks if root is None else blocks @ root
    right = torch.linalg.eigh(white.mT @ white)[1][..., -t:]
    left = white @ right
    return left, right if root is None else torch.linalg.solve_triangular(
        root.mT, right, upper=True
    )


def _own_blocks(x: Tensor, b: int) -> Tensor:
    m, n = x.shape
    return x.reshape(b, m // b, b, n // b).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _prepared(
    weight: Tensor, num_blocks: int, gram: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and regularised Gram in float64: closed forms are cheap."""
    check_blocks(weight, num_blocks)
    return weight.detach().double(), None if gram is None else regularised(gram.double())


def _structured(
    weight: Tensor, gram: Tensor | None, factors: Triple, parameters: int
) -> Structured:
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    u, s, v = (x.to(dtype).contiguous() for x in factors)
    return Structured(Factors(u, v, s, relative_error(weight, (u, s, v), gram)), parameters)
