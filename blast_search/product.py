"""The BLAST product as PyTorch knows it: an autograd function, and a custom operator.

Plain eager calls run the autograd function, or the bare kernel where no gradient is needed: the
operator's dispatch costs some tens of microseconds, more than a small layer.  Whatever watches
operators (torch.compile, export, FLOP counters, tracing) gets `blast_search::matmul`, which has
a fake implementation, gradients, and formulas for PyTorch's and fvcore's counters.  Function
transforms and forward-mode AD get plain operations.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from blast_search import kernels


def _forward(
    rows: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    _check(rows, u, s, v, bias)
    b, _, r = u.shape
    return kernels.forward(rows, u, s, v, bias, _choose(rows, b, r), keep)


def _check(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> None:
    """Compiled kernels trust what they are given: a wrong shape or dtype would be a wild read.

    Raises:
        RuntimeError: as nn.Linear does for shapes, dtypes or devices that do not fit.
    """
    (b, p, r), (c, q, k) = u.shape, v.shape
    same = (
        x.dtype is u.dtype is s.dtype is v.dtype and x.is_cpu == u.is_cpu == s.is_cpu == v.is_cpu
    )
    if not x.is_cpu:  # comparing devices takes longer, and there may be several
        same = same and x.device == u.device == s.device == v.device
    fits = b == c and r == k and s.shape == (b, b, r) and x.shape[1] == b * q
    if bias is not None:
        same = same and bias.dtype is x.dtype and bias.is_cpu == x.is_cpu
        same = same and (x.is_cpu or bias.device == x.device)
        fits = fits and bias.shape == (b * p,)
    if same and fits:
        return
    found = ", ".join(
        f"{name} {tuple(t.shape)} {t.dtype} on {t.device}"
        for name, t in zip(("x", "U", "S", "V", "bias"), (x, u, s, v, bias), strict=True)
        if t is not None
    )
    raise RuntimeError(
        f"BLAST product of {found}; expected one dtype and device, and x (T, b q), U (b, p, r), "
        "S (b, b, r), V (b, q, r), bias (b p)."
    )


def _choose(rows: Tensor, b: int, r: int) -> str:
    return kernels.choose(b, r, rows.dtype, "cpu" if rows.is_cpu else rows.device.type, len(rows))


def _backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    z: Tensor | None,
    needs: kernels.Needs,
) -> kernels.Gradients:
    b, _, r = u.shape
    rows = _rows(x)
    dx, du, ds, dv = kernels.backward(_rows(grad), rows, u, s, v, z, needs, _choose(rows, b, r))
    return None if dx is None else dx.view(x.shape), du, ds, dv


def _rows(x: Tensor) -> Tensor:
    """(..., n) as (T, n) with unit inner stride."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _Product(torch.autograd.Function):
    """x and y are rows: whatever is done to y in place, as by an activation, a view forbids."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None
    ) -> Tensor:
        y, z = _forward(x, u, s, v, bias, keep=True)
        ctx.save_for_backward(x, u, s, v, z)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        x, u, s, v, z = ctx.saved_tensors
        grads = _backward(grad, x, u, s, v, z, needs[:4])
        return *grads, _rows(grad).sum(0) if needs[4] else None


def eager(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The product without the dispatcher."""
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, u, s, v, bias)
    ):
        if len(u) == 1 and not (x.is_cpu and kernels.emulated(x.dtype)):
            return kernels.composed.low_rank(x, u, s, v, bias)
        y: Tensor = _Product.apply(_rows(x), u, s, v, bias)  # type: ignore[no-untyped-call]
    else:
        y = _forward(_rows(x), u, s, v, bias)[0]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def observed(x: Tensor) -> bool:
    """Whether something watches operators: a compiler, a tracer, a dispatch mode, a subclass."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) or forward-mode AD is at work.

    They know neither the kernels nor the autograd function; tangents would be lost silently.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def plain(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The product in PyTorch's own operations only, for whatever has rules for these."""
    blocks = torch.unflatten(x, -1, (len(v), v.shape[1]))
    z = torch.einsum("...jq,jqr->...jr", blocks, v)
    w = torch.einsum("...jr,ijr->...ir", z, s)
    y = torch.einsum("...ir,ipr->...ip", w, u).flatten(-2)
    return y if bias is None else y + bias


@torch.library.custom_op(
    "blast_search::matmul",
    mutates_args=(),
    schema="(Tensor x, Tensor u, Tensor s, Tensor v, Tensor? bias) -> Tensor",
)
def _operator(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    y = _forward(_rows(x), u, s, v, bias)[0]
    # No view of it may leave an operator with a gradient (see _Product).
    shape = (*x.shape[:-1], y.shape[1])
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, shape)  # type: ignore[no-any-return]


@_operator.register_fake
def _(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], u.shape[0] * u.shape[1])


@torch.library.custom_op(
    "blast_search::matmul_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor u, Tensor s, Tensor v) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
def _operator_backward(
    grad: Tensor, x: Tensor, u: Tensor, s: Tensor, v: Tensor
) -> kernels.Gradients:
    return _backward(grad, x, u, s, v, None, (True, True, True, True))


@_operator_backward.register_fake
def _(grad: Tensor, x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Sequence[Tensor]:
    return tuple(t.new_empty(t.shape) for t in (x, u, s, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias = inputs
    ctx.save_for_backward(*tensors)
    ctx.biased = bias is not None


def _operator_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _operator_backward(grad.contiguous(), *ctx.saved_tensors)
    return *grads, _rows(grad).sum(0) if ctx.biased else None


_operator.register_autograd(_operator_gradients, setup_context=_setup)


def matmul(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The product as one operator call."""
    if not torch.compiler.is_compiling():  # which counts nothing, and cannot trace that
        _register_formulas()
    return torch.ops.blast_search.matmul(x, u, s, v, bias)  # type: ignore[no-any-return]


def macs(x_shape: Sequence[int], u_shape: Sequence[int], v_shape: Sequence[int]) -> int:
    """Multiply-adds of one product: T r (m + n + b^2); x (..., n), u (b, p, r), v (b, q, r)."""
    b, p, r = u_shape
    tokens: int = math.prod(x_shape[:-1])
    return tokens * r * (b * p + b * v_shape[1] + b * b)


def _register_formulas() -> None:
    """Teach PyTorch's FLOP counter the operators once it is in use (importing it is slow).

    A counter copies the formulas when it is made, so those that are counting now are told too.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or torch.ops.blast_search.matmul in counter.flop_registry:
        return
    ops = torch.ops.blast_search

    @counter.register_flop_formula(ops.matmul)  # type: ignore[untyped-decorator]
    def _(x: Any, u: Any, s: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * macs(x, u, v)

    @counter.register_flop_formula(ops.matmul_backward)  # type: ignore[untyped-decorator]
    def _(grad: Any, x: Any, u: Any, s: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        # Twice the forward pass, and z and w once more.
        b, _, r = u
        again: int = math.prod(x[:-1]) * r * (b * v[1] + b * b)
        return 4 * macs(x, u, v) + 2 * again

    for mode in _get_current_dispatch_mode_stack():
        known = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(known, dict):
            for op in (ops.matmul, ops.matmul_backward):
                known.setdefault(op, counter.flop_registry[op])


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], dict[str, int]]]:
    """For fvcore: FlopCountAnalysis(model, x).set_op_handle(**fvcore_handles()); counts MACs."""

    def count(inputs: list[Any], outputs: list[Any]) -> dict[str, int]:
        x, u, _, v = (value.type().sizes() for value in inputs[:4])
        return {"blast_matmul": macs(x, u, v)}

    return {"blast_search::matmul": count}
