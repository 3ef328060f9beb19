"""The BLAST matrix: what it is, what it computes, what it costs.

Legend (used in every file): A is (m, n), m = out_features, n = in_features, b x b blocks,
p = m / b, q = n / b, rank r:

    A_ij = U_i diag(s_ij) V_j^T      U: (b, p, r)   V: (b, q, r)   S: (b, b, r)
    y    = concat_i( (sum_j s_ij * (x_j V_j)) U_i^T )

Lee, Kwon, Qu, Kim: BLAST, NeurIPS 2024, arXiv 2410.21262, equations 1 to 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from blast_search import kernels, product

if TYPE_CHECKING:
    from blast_search.factors import Factors

torch.fx.wrap("blast_matmul")  # one call in symbolic traces, as it looks at what x is


def to_dense(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """The (m, n) matrix of the factors u (b, p, r), s (b, b, r), v (b, q, r)."""
    b, q, r = v.shape
    rows = s.unsqueeze(2) * v.unsqueeze(0)  # (i, j, q, r): diag(s_ij) V_j^T, transposed
    return (u @ rows.reshape(b, b * q, r).transpose(1, 2)).reshape(-1, b * q)


def blast_matmul(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """x A^T + bias for the BLAST matrix A of the factors; never builds a (b, b, T, r) tensor.

    Differentiable once (under torch.func as often as wanted).  The kernel is chosen by b, r, dtype
    and device (kernels.choose).

    Args:
        x: (..., n). u: (b, p, r). s: (b, b, r). v: (b, q, r). bias: (m,).

    Returns:
        (..., m), the dtype of x (under autocast: the autocast dtype, but float64 as it is).
    """
    observed = product.observed(x)
    kind = "cpu" if x.is_cpu else x.device.type
    # "meta" has no autocast; and as nn.Linear's, float64 is nothing to save time on.
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, u, s, v = x.to(dtype), u.to(dtype), s.to(dtype), v.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not observed and product.transformed():
        return product.plain(x, u, s, v, bias)
    if observed and len(u) == 1 and torch.compiler.is_compiling():
        # Plain products, which a compiler can fuse.
        return kernels.composed.low_rank(x, u, s, v, bias)
    return (product.matmul if observed else product.eager)(x, u, s, v, bias)


def _orthogonal(shape: Sequence[int], device: torch.device) -> Tensor:
    """(k, rows, columns): k random matrices of orthogonal rows or columns, elements of rms 1."""
    k, rows, columns = shape
    long, short = max(rows, columns), min(rows, columns)
    # In float32 whatever the layer's dtype: there is no bfloat16 QR.
    tall = torch.randn(k, long, short, device=device, dtype=torch.float32)
    q: Tensor = torch.linalg.qr(tall)[0] * long**0.5
    return q if rows >= columns else q.mT


class BlastLinear(nn.Module):
    """A drop-in for nn.Linear whose weight is a BLAST matrix.

    Parameters: r (m + n + b^2), and as many multiply-adds per token; plus m for the bias.
    Input (..., in_features), output (..., out_features).

    A fresh layer is ready to train from scratch: see reset_parameters, and scratch.py for whole
    models and learning rates.  At b = 1 couplings only scale U's columns: in a layer that replaces
    another (empty_like, from_linear) S is then a buffer of ones, and what is loaded or set is
    folded into U.

    Raises:
        ValueError: num_blocks does not divide both sides, or rank < 1.
    """

    S: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_blocks < 1 or in_features % num_blocks or out_features % num_blocks:
            raise ValueError(
                f"num_blocks={num_blocks} must divide in_features={in_features} and "
                f"out_features={out_features}; num_blocks=1 (low rank) always does."
            )
        if rank < 1:
            raise ValueError(f"rank={rank}, expected at least 1.")
        self.in_features, self.out_features = in_features, out_features
        self.num_blocks, self.rank = num_blocks, rank
        b = num_blocks
        new = {"device": device, "dtype": dtype}
        self.U = nn.Parameter(torch.empty(b, out_features // b, rank, **new))  # type: ignore[arg-type]
        self.S = nn.Parameter(torch.empty(b, b, rank, **new))  # type: ignore[arg-type]
        self.V = nn.Parameter(torch.empty(b, in_features // b, rank, **new))  # type: ignore[arg-type]
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, **new)) if bias else None,  # type: ignore[arg-type]
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh values: Var(A_kl) = r E[U^2] E[S^2] E[V^2] = 1 / (3 n), as nn.Linear's.

        All factors are random orthogonal matrices, scaled: every U_i, every V_j, and the b x b
        couplings of each rank component.  So the variance hardly depends on the draw, A has rank
        min(m, n, b r), which equal couplings would cap at r, and its singular values are more
        even: at b = 4 normal factors make the largest one 2.4 to 3.2 times as large.  Trained,
        orthogonal factors reached the lower loss: results/scratch.
        """
        b, r = self.num_blocks, self.rank
        with torch.no_grad():
            for factor in (self.U, self.V):
                factor.copy_(self._size * _orthogonal(factor.shape, factor.device))
            if b == 1:
                self.S.fill_(1)
            else:
                self.S.copy_(_orthogonal((r, b, b), self.S.device).permute(1, 2, 0))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def _size(self) -> float:
        """Root mean square of U and of V in a fresh layer."""
        return float((3 * self.in_features * self.rank) ** -0.25)

    @property
    def weight(self) -> Tensor:
        """The dense (m, n) weight, rebuilt on each access (for code that reads `.weight`).

        So a search leaves alone the layers whose weight the model's forward reads.
        """
        return self.to_dense()

    def to_dense(self) -> Tensor:
        """The dense (m, n) matrix of the factors."""
        return to_dense(self.U, self.S, self.V)

    def forward(self, input: Tensor) -> Tensor:
        x = input  # nn.Linear's name for it: layers may be called with layer(input=x)
        # nn.Module looks up each attribute in several places: 3 us, a tenth of a small layer.
        own = self._parameters
        whole = "U" in own and "V" in own and "bias" in own  # not parametrised, pruned, sharded
        if not whole or torch.compiler.is_compiling():
            return blast_matmul(x, self.U, self.S, self.V, self.bias)
        if "S" in own:
            return blast_matmul(x, own["U"], own["S"], own["V"], own["bias"])  # type: ignore[arg-type]
        # Asked of U first: a symbolic trace knows nothing of x.
        many = own["U"].is_cuda and not product.observed(x) and x.numel() > self.in_features  # type: ignore[union-attr]
        if many and "S" in self._buffers:
            # Two launches; a third one for couplings of one would be a tenth of the time.  For a
            # single token there is a faster kernel.
            return kernels.composed.low_rank(x, self.U, None, self.V, self.bias)
        return blast_matmul(x, own["U"], self.S, own["V"], own["bias"])  # type: ignore[arg-type]

    def set_factors(self, factors: Factors) -> None:
        """Copy factors into the parameters.

        Raises:
            ValueError: they have other shapes than this layer's.
        """
        given = (factors.U, factors.S, factors.V)
        pairs = list(zip((self.U, self.S, self.V), given, strict=True))
        for own, value in pairs:
            if own.shape != value.shape:
                raise ValueError(f"a factor is {tuple(value.shape)}, expected {tuple(own.shape)}.")
        with torch.no_grad():
            for own, value in pairs:
                own.copy_(value)
            self._fold()

    def _fold(self) -> None:
        """Couplings that are a buffer: into U.  A new U, as the old one may be the caller's."""
        if "S" not in self._buffers or self.S.is_meta or bool((self.S == 1).all()):
            return
        with torch.no_grad():
            self.U = nn.Parameter(self.U * self.S, self.U.requires_grad)
            self.S = torch.ones_like(self.S)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._fold()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        num_blocks: int,
        rank: int,
        gram: Tensor | None = None,
    ) -> Self:
        """Factorise a layer (nn.Linear or Hugging Face Conv1D); its bias is copied.

        Args:
            gram: (n, n), E[x x^T] of the layer's inputs; makes the factors activation-aware.
        """
        from blast_search.factorize import factorize
        from blast_search.layers import dense_weight

        weight = dense_weight(linear)
        layer = cls.empty_like(linear, num_blocks, rank)
        layer.set_factors(factorize(weight, num_blocks, rank, gram))
        return layer

    @classmethod
    def empty_like(cls, linear: nn.Module, num_blocks: int, rank: int) -> Self:
        """An unfitted layer with the shape, device, dtype, mode and bias of `linear`.

        Its factors are placeholders (cheap to draw, of usual size); set_factors, load_state_dict
        or reset_parameters gives them a meaning.
        """
        from blast_search.layers import dense_weight

        weight = dense_weight(linear)
        m, n = weight.shape
        bias = linear.bias
        layer = cls(n, m, num_blocks, rank, bias is not None, "meta", weight.dtype)
        layer = layer.to_empty(device=weight.device)
        for factor, std in ((layer.U, layer._size), (layer.S, 1), (layer.V, layer._size)):
            nn.init.normal_(factor, std=std)
        if num_blocks == 1:
            del layer.S
            layer.register_buffer("S", weight.new_ones(1, 1, rank))
        if isinstance(bias, Tensor):
            with torch.no_grad():
                layer.bias.copy_(bias).requires_grad_(bias.requires_grad)  # type: ignore[union-attr]
        trainable = getattr(linear, "weight").requires_grad  # noqa: B009
        for factor in (layer.U, layer.S, layer.V):
            if isinstance(factor, nn.Parameter):
                factor.requires_grad_(bool(trainable))
        return layer.train(linear.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_blocks={self.num_blocks}, rank={self.rank}, bias={self.bias is not None}"
        )
