"""Batches and outputs: how a model is called, and how far two outputs are apart.

A batch is a tensor, called as model(x); a tuple, model(*x); or a dict, model(**x).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from blast_search.errors import IncompatibleInputError
from blast_search.fused import unfused

Batch = Any  # Tensor | tuple[Any, ...] | dict[str, Any]


def call_model(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where a model takes its inputs, and in which floating dtype (None: it has none).

    Its first parameter may well be of integers, or complex, into which no input is to be cast.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return next(model.parameters()).device, dtype


def to_device(batch: Any, model: nn.Module) -> Any:
    """The batch on the device of the model's parameters; floating inputs in their dtype."""
    device, dtype = _place(model)

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, Mapping):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            items = [move(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    return move(batch)


def move_model(
    model: nn.Module, device: torch.device | str, dtype: torch.dtype | None
) -> nn.Module:
    """Move a model, in place, to a device and its floating-point tensors to a dtype (None: kept).

    `model.to` would also make complex tensors real, their imaginary part lost.
    """
    model._apply(  # type: ignore[no-untyped-call]
        lambda t: t.to(device, dtype if t.is_floating_point() else None)
    )
    return model


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within it, models are in eval mode; afterwards every submodule is in the mode it had.

    Modes may differ inside a model: a frozen BatchNorm stays in eval mode while others train.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    roots = [(model, model.training) for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in roots:
            model.train(mode)  # some models do more in `train` than setting the flag
        for module, mode in modes:
            module.training = mode


@contextmanager
def anywhere(*models: nn.Module) -> Iterator[None]:
    """Within it, models take inputs from any device and in any floating dtype.

    A task's own code then need not know where and in which dtype the model is: what it passes in
    is moved to the model, and the output goes back to where the (first) input was.
    """
    with ExitStack() as stack:
        for model in models:
            came: list[Tensor] = []

            def arrive(
                model: nn.Module, args: Any, kwargs: Any, came: list[Tensor] = came
            ) -> tuple[Any, Any]:
                tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                floats = [t for t in tensors if t.is_floating_point()]
                came[:] = (floats or tensors)[:1]
                return to_device(args, model), to_device(kwargs, model)

            def leave(model: nn.Module, args: Any, output: Any, came: list[Tensor] = came) -> Any:
                if not came:
                    return output
                first, (device, dtype) = came.pop(), _place(model)
                same = not first.is_floating_point() or dtype in (None, first.dtype)
                if same and first.device == device:
                    return output

                def back(value: Any) -> Any:
                    if not isinstance(value, Tensor):
                        return value
                    cast = None if same or not value.is_floating_point() else first.dtype
                    return value.to(first.device, cast)

                return tree_map(back, output)

            hooks = (
                model.register_forward_pre_hook(arrive, with_kwargs=True),
                model.register_forward_hook(leave),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        yield


def output_tensor(output: Any) -> tuple[Tensor, bool]:
    """The tensor that carries an output's meaning, and whether it holds class logits.

    Tensors stand for themselves; Hugging Face outputs give `.logits` if they have them.  Of other
    containers (dicts, tuples, lists, dataclasses, also nested) it is the first floating tensor,
    but a scalar, most often a loss, only where there is no other.

    Raises:
        IncompatibleInputError: there is no floating tensor.
    """
    if isinstance(output, Tensor):
        return output, False
    logits = output.get("logits") if isinstance(output, Mapping) else None
    logits = getattr(output, "logits", None) if logits is None else logits
    if isinstance(logits, Tensor):
        return logits, True
    found = [value for value in _tensors(output) if value.is_floating_point()]
    if found:
        return next((value for value in found if value.dim()), found[0]), False
    raise IncompatibleInputError(
        f"the model returned {type(output).__name__} without a tensor. Expected a tensor, a "
        "tuple or an output with .logits: wrap the model so that it returns one."
    )


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors inside an output, depth first."""
    if isinstance(output, Tensor):
        yield output
        return
    values: Iterable[Any] = ()
    if isinstance(output, Mapping):
        values = output.values()
    elif isinstance(output, tuple | list):
        values = output
    elif is_dataclass(output) and not isinstance(output, type):
        values = [getattr(output, field.name) for field in fields(output)]
    for value in values:
        yield from _tensors(value)


def token_mask(batch: Batch, shape: tuple[int, ...]) -> Tensor | None:
    """A boolean (B, L) mask of real tokens where the batch has one that fits `shape`."""
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and tuple(mask.shape) == shape[:2]:
            return mask.bool()
    return None


def divergence(output: Any, reference: Any, batch: Batch) -> Tensor:
    """How far an output is from the dense model's: the loss that the search minimises, a scalar.

    KL(dense || compressed) in nats per position for logits; otherwise the squared error relative
    to the reference's squared norm.  Padding is left out.

    Classes are in the last dimension, or in the second of images (B, classes, height, width).  One
    alone is no distribution but a number (regression), for which it is the squared error, too.
    """
    (found, logits), (wanted, _) = output_tensor(output), output_tensor(reference)
    found, wanted = found.float(), wanted.float()
    if logits and wanted.dim() == 4:
        found, wanted = found.movedim(1, -1), wanted.movedim(1, -1)
    mask = token_mask(batch, tuple(wanted.shape)) if wanted.dim() > 2 else None
    if mask is not None:
        found, wanted = found[mask], wanted[mask]
    width = wanted.shape[-1] if wanted.dim() else 1
    if logits and width > 1:
        found, wanted = (t.reshape(-1, width).log_softmax(-1) for t in (found, wanted))
        return F.kl_div(found, wanted, log_target=True, reduction="batchmean")
    return (found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)


@torch.no_grad()
def reference_outputs(model: nn.Module, batches: list[Batch]) -> list[Any]:
    """The dense model's outputs on the calibration batches.

    Raises:
        IncompatibleInputError: an output is not finite.
    """
    outputs = []
    for index, batch in enumerate(batches):
        with unfused():
            output = call_model(model, to_device(batch, model))
        if not bool(output_tensor(output)[0].isfinite().all()):
            raise IncompatibleInputError(
                f"the model's output on calibration batch {index} is not finite (NaN or "
                "infinity). Check the calibration data and the weights."
            )
        outputs.append(output)
    return outputs


@torch.no_grad()
def divergences(
    model: nn.Module, batches: Sequence[Batch], references: Sequence[Any]
) -> Iterator[float]:
    """`divergence` of one calibration batch after another."""
    for batch, reference in zip(batches, references, strict=True):
        with unfused():
            output = call_model(model, to_device(batch, model))
        yield float(divergence(output, reference, batch))


def spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread over the whole range."""
    golden = (5**0.5 - 1) / 2
    return sorted(range(count), key=lambda i: (0.5 + golden * i) % 1)
