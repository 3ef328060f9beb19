"""The closed form for b = 1: the whitened SVD, every rank at once.

With P the r leading eigenvectors of A G A^T, the best rank-r matrix is P P^T A: no inverse of G.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blast_search.errors import IncompatibleInputError
from blast_search.factors import Factors
from blast_search.gram import regularised, warn_if_singular


@dataclass(frozen=True)
class LowRankBasis:
    """The best low-rank factors of one weight at every rank (left: (m, k), right: (n, k))."""

    left: Tensor
    right: Tensor
    energy: Tensor  # (k,), squared singular values in the Gram's norm, descending; on the CPU
    total: float

    def to(self, device: torch.device) -> LowRankBasis:
        """The same with its factors on another device."""
        return replace(self, left=self.left.to(device), right=self.right.to(device))

    def error(self, rank: int) -> float:
        """Relative error of the best rank-`rank` matrix."""
        kept = float(self.energy[:rank].sum())
        return max(0.0, 1 - kept / self.total) ** 0.5 if self.total > 0 else 0.0

    def factors(self, rank: int, num_blocks: int = 1) -> Factors:
        """The best rank-`rank` matrix in b x b blocks, all couplings one (b = 1: low rank).

        Zero-padded beyond the weight's rank.
        """
        u, v = self.left[:, :rank], self.right[:, :rank]
        scale = v.norm(dim=0).clamp_min(torch.finfo(v.dtype).tiny).sqrt()
        u, v = u * scale, v / scale
        if missing := rank - u.shape[1]:
            u, v = (torch.nn.functional.pad(t, (0, missing)) for t in (u, v))
        u, v = (t.reshape(num_blocks, -1, rank) for t in (u, v))
        ones = torch.ones(num_blocks, num_blocks, rank, dtype=u.dtype, device=u.device)
        return Factors(u, v, ones, self.error(rank))


def low_rank_basis(
    weight: Tensor, gram: Tensor | None = None, max_rank: int = 0, name: str = ""
) -> LowRankBasis:
    """The whitened SVD of weight (m, n), up to `max_rank` (0: all ranks), computed in float64.

    Args:
        gram: (n, n) or its diagonal (n,), regularised here.
        name: the layer's, for the warning about a singular Gram.
    """
    if gram is None:
        return whitened_svd(weight, None, max_rank)
    gram = gram.to(weight.device, torch.float64)
    g = regularised(gram)
    warn_if_singular(gram, name)
    return whitened_svd(weight, g, max_rank)


def whitened_svd(weight: Tensor, g: Tensor | None, max_rank: int = 0) -> LowRankBasis:
    """As low_rank_basis, for a Gram (n, n) that is positive definite as it stands.

    An eigendecomposition of the smaller side: 3x as fast as an SVD.
    """
    a = weight.double()
    m, n = a.shape
    g = None if g is None else g.double()
    if m <= n:
        energy, left = torch.linalg.eigh(a @ (a.T if g is None else g @ a.T))
    else:
        root, info = (None, 0) if g is None else torch.linalg.cholesky_ex(g)
        if int(info):
            raise IncompatibleInputError(
                "the Gram of a layer's inputs is not positive semi-definite, expected E[x x^T] or "
                "X^T X."
            )
        al = a if root is None else a @ root
        energy, right = torch.linalg.eigh(al.T @ al)
        left = al @ right / energy.clamp_min(energy.max() * 1e-14 + 1e-300).sqrt()
    total = float((a * (a if g is None else a @ g)).sum())
    keep = min(max_rank or len(energy), len(energy))
    left = left.flip(1)[:, :keep]
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    return LowRankBasis(
        left.to(dtype), (a.T @ left).to(dtype), energy.flip(0)[:keep].clamp_min(0).cpu(), total
    )
