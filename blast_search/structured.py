"""Block-diagonal and Monarch layers in their own form: what `compare` times and trains.

Both are BLAST matrices with most couplings zero (structures.py fits them so).  Run as BLAST, they
would pay for couplings that they do not have; here a block-diagonal layer is one batched product,
a Monarch layer two with a permutation in between:

    block-diagonal   y_i = D_i x_i                               weight: (b, p, q)
    Monarch          y_i = sum_j L_ij (R_ij^T x_j)               right: (b_j, q, b_i t)
                                                                 left: (b_i, b_j t, p)

Monarch is block low rank: every block A_ij has rank t of its own.  Letters as in matrix.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from blast_search.factors import Factors
from blast_search.layers import dense_weight
from blast_search.matrix import BlastLinear
from blast_search.space import Candidate
from blast_search.structures import block_diagonal, monarch

# Tokens per pass on a CPU: what lies between the two products stays in the cache.
CPU_CHUNK = 512


@dataclass(frozen=True, order=True)
class Structure(Candidate):
    """A way to store a weight that only `compare` uses."""


@dataclass(frozen=True, order=True)
class BlockDiagonal(Structure):
    """b dense diagonal blocks; rank is 0."""

    @property
    def key(self) -> str:
        return f"diagonal{self.num_blocks}"

    def params(self, m: int, n: int) -> int:
        """Parameters of an m x n weight."""
        return m * n // self.num_blocks


@dataclass(frozen=True, order=True)
class Monarch(Structure):
    """b x b blocks of rank `rank` (t) each."""

    @property
    def key(self) -> str:
        return f"monarch{self.num_blocks}r{self.rank}"

    def params(self, m: int, n: int) -> int:
        """Parameters of an m x n weight."""
        return self.num_blocks * self.rank * (m + n)


class StructuredLinear(nn.Module):
    """Base of the two layers: input (..., n), output (..., m)."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, num_blocks: int) -> None:
        """An unfitted layer with the shape, device, dtype, mode and bias of a linear layer."""
        super().__init__()
        weight = dense_weight(linear)
        self.out_features, self.in_features = weight.shape
        self.num_blocks = num_blocks
        self.p, self.q = self.out_features // num_blocks, self.in_features // num_blocks
        self._new: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        bias = linear.bias
        copied = None
        if isinstance(bias, Tensor):
            copied = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        self.register_parameter("bias", copied)
        self._trainable = bool(getattr(linear, "weight").requires_grad)  # noqa: B009
        self.train(linear.training)

    def _parameter(self, std: float, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, **self._new) * std, self._trainable)

    def _split(self, x: Tensor) -> Tensor:
        """(T, n) as (b, T, q), without a copy."""
        return torch.unflatten(x, 1, (self.num_blocks, self.q)).transpose(0, 1)

    def _joined(self, parts: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """parts_i (T, k) times weights_i (k, p), side by side, plus the bias: (T, m).

        On a CPU, without gradients, the products are written in place one by one: joining the
        result of a batched product takes up to as long as the product itself.
        """
        if torch.is_grad_enabled() or not parts.is_cpu:
            y = torch.bmm(parts, weights).transpose(0, 1).flatten(1)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        if out is None:
            out = parts.new_empty(parts.shape[1], self.out_features)
        for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            own = slice(i * self.p, (i + 1) * self.p)
            if self.bias is None:
                torch.mm(part, weight, out=out[:, own])
            else:
                torch.addmm(self.bias[own], part, weight, out=out[:, own])
        return out

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_blocks={self.num_blocks}, bias={self.bias is not None}"
        )


class BlockDiagonalLinear(StructuredLinear):
    """y_i = D_i x_i + bias_i: m n / b parameters, and as many multiply-adds per token."""

    def __init__(self, linear: nn.Module, num_blocks: int) -> None:
        super().__init__(linear, num_blocks)
        self.weight = self._parameter((3 * self.q) ** -0.5, num_blocks, self.p, self.q)

    def forward(self, input: Tensor) -> Tensor:
        x, rows = input, input.reshape(-1, self.in_features)
        return self._joined(self._split(rows), self.weight.mT).view(
            *x.shape[:-1], self.out_features
        )

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> Self:
        """Take over BLAST factors that hold this structure (structures.block_diagonal)."""
        self.weight.copy_(factors.U @ factors.V.mT)  # one of the two is the identity
        return self


class MonarchLinear(StructuredLinear):
    """y_i = sum_j L_ij (R_ij^T x_j) + bias_i: b t (m + n) parameters and multiply-adds."""

    def __init__(self, linear: nn.Module, num_blocks: int, block_rank: int) -> None:
        super().__init__(linear, num_blocks)
        b, t = num_blocks, block_rank
        self.block_rank = t
        std = (1 / (3 * self.in_features * t)) ** 0.25
        self.right = self._parameter(std, b, self.q, b * t)
        self.left = self._parameter(std, b, b * t, self.p)

    def forward(self, input: Tensor) -> Tensor:
        x, rows = input, input.reshape(-1, self.in_features)
        if torch.is_grad_enabled() or not rows.is_cpu:
            y = self._joined(self._permuted(rows), self.left)
        else:
            y = rows.new_empty(len(rows), self.out_features)
            for start in range(0, len(rows), CPU_CHUNK):
                chunk = slice(start, start + CPU_CHUNK)
                self._joined(self._permuted(rows[chunk]), self.left, y[chunk])
        return y.view(*x.shape[:-1], self.out_features)

    def _permuted(self, rows: Tensor) -> Tensor:
        """R_ij^T x_j as (b_i, T, b_j t)."""
        z = torch.bmm(self._split(rows), self.right)  # (j, T, i t)
        by_block = torch.unflatten(z, 2, (self.num_blocks, self.block_rank))
        return by_block.permute(2, 1, 0, 3).flatten(2)

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> Self:
        """Take over BLAST factors that hold this structure (structures.monarch)."""
        b, t = self.num_blocks, self.block_rank
        u, v = (torch.unflatten(x, 2, (b, t)) for x in (factors.U, factors.V))
        right, left = torch.unflatten(self.right, 2, (b, t)), torch.unflatten(self.left, 1, (b, t))
        for i in range(b):
            for j in range(b):
                slot = (i + j) % b
                right[j, :, i].copy_(v[j, :, slot])
                left[i, j].copy_(u[i, :, slot].T)
        return self


def empty_layer(
    linear: nn.Module, candidate: Candidate
) -> BlastLinear | BlockDiagonalLinear | MonarchLinear:
    """An unfitted layer of a candidate that is not dense, in the place of `linear`."""
    if isinstance(candidate, BlockDiagonal):
        return BlockDiagonalLinear(linear, candidate.num_blocks)
    if isinstance(candidate, Monarch):
        return MonarchLinear(linear, candidate.num_blocks, candidate.rank)
    return BlastLinear.empty_like(linear, candidate.num_blocks, candidate.rank)


def fit_structure(weight: Tensor, candidate: Structure, gram: Tensor | None) -> Factors:
    """The best factors of a structure for a weight (m, n), in its Gram's norm."""
    if isinstance(candidate, Monarch):
        return monarch(weight, candidate.num_blocks, candidate.rank, gram).factors
    return block_diagonal(weight, candidate.num_blocks, gram).factors


def diagonal_choice(m: int, n: int, num_blocks: int) -> BlockDiagonal | None:
    """b diagonal blocks for an m x n weight, or None where b does not divide it."""
    return None if m % num_blocks or n % num_blocks else BlockDiagonal(num_blocks, 0)


def monarch_choice(m: int, n: int, num_blocks: int, keep: float, multiple: int) -> Monarch | None:
    """The Monarch layer of b x b blocks that keeps about `keep` of an m x n weight's parameters.

    b t is rounded to a multiple of `multiple` where the layer is large enough for that.  None
    where b does not divide the weight, or where no parameter would be saved.
    """
    if m % num_blocks or n % num_blocks:
        return None
    exact = keep * m * n / (num_blocks * (m + n))
    step = max(1, math.ceil(multiple / num_blocks))
    while step > 1 and exact < 2 * step:
        step //= 2
    rank = min(max(1, round(exact / step) * step), min(m, n) // num_blocks)
    choice = Monarch(num_blocks, rank)
    return choice if choice.params(m, n) < m * n else None
