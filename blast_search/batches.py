"""Batches: how a model is called, where, and in which dtype.

A batch is a tensor, called as model(x); a tuple, model(*x); or a dict, model(**x).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from blast_search.errors import IncompatibleInputError, in_one_line
from blast_search.fused import unfused

FORMS = "a tensor (model(x)), a tuple (model(*x)) or a dict (model(**x))"
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
    """The batch on the device of the model's parameters; floating inputs in their dtype.

    Containers of other kinds than dict, tuple and list keep their kind and their attributes (an
    output of Hugging Face's that is an input again).  They are copies, as dicts are: a loss that
    takes its labels out of a batch takes them out of its own.
    """
    device, dtype = _place(model)

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, PackedSequence):  # its batch_sizes stay on the CPU
            return value.to(device=device, dtype=move(value.data).dtype)  # type: ignore[call-arg]
        if isinstance(value, Mapping):
            moved = {key: move(item) for key, item in value.items()}
            if type(value) is dict or not isinstance(value, MutableMapping):
                return moved
            twin = copy.copy(value)
            for key, item in moved.items():
                if item is not value[key]:
                    twin[key] = item
            return twin
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
def seeded(seed: int = 0) -> Iterator[None]:
    """Within it, the generators that a task may draw from start with `seed`; then they go on.

    Those of Python, numpy and PyTorch: plans are then judged by the same draws, and a run that is
    resumed sees the data of its beginning.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


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
                    if isinstance(value, PackedSequence):
                        return value.to(device=first.device, dtype=back(value.data).dtype)  # type: ignore[call-arg]
                    if not isinstance(value, Tensor):
                        return value
                    cast = None if same or not value.is_floating_point() else first.dtype
                    return value.to(first.device, cast)

                return tree_map(back, output, is_leaf=lambda v: isinstance(v, PackedSequence))

            hooks = (
                model.register_forward_pre_hook(arrive, with_kwargs=True),
                model.register_forward_hook(leave),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        yield


@contextmanager
def calling(what: str, expected: str) -> Iterator[None]:
    """Within it, a model is called with a batch that a task made.

    Raises:
        IncompatibleInputError: it cannot be; `what` the batch is, and what is `expected`.
    """
    try:
        yield
    except IncompatibleInputError:  # says already what is wrong
        raise
    except Exception as error:
        raise IncompatibleInputError(
            f"the model cannot be called with {what}: {in_one_line(error)}. Expected {expected}"
        ) from error


def tried(model: nn.Module, batch: Batch, what: str, expected: str) -> Any:
    """The model's output for a batch: the first call shows whether it can be (see `calling`)."""
    with calling(what, expected), torch.no_grad(), evaluating(model), unfused():
        return call_model(model, to_device(batch, model))


def spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread over the whole range."""
    golden = (5**0.5 - 1) / 2
    return sorted(range(count), key=lambda i: (0.5 + golden * i) % 1)
