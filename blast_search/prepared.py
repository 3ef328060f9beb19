"""A task ready to be searched: its dense model on the device, its layers, its workloads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from blast_search.apply import duplicate
from blast_search.batches import FORMS, Batch, move_model, seeded, tried
from blast_search.calibrate import as_batches, data_digest, reached
from blast_search.errors import IncompatibleInputError
from blast_search.evaluate import Task, count_params, workloads_of
from blast_search.latency import cells_for, describe, fingerprint
from blast_search.layers import Workload, inventory
from blast_search.model_latency import steered
from blast_search.modes import check_mode
from blast_search.outputs import divergence, output_tensors, reference_outputs
from blast_search.settings import DTYPES, Settings, pick_device
from blast_search.space import LayerSpec, SearchSpace
from blast_search.tables import Cell

NOT_REACHED = "not reached by the calibration data"
SAME = 1e-5  # divergence of two calls that counts as none


@dataclass
class Prepared:
    """A task's dense model on its device, with what is known before anything is measured."""

    task: Task
    model: nn.Module
    layers: list[LayerSpec]
    skipped: dict[str, str]
    space: SearchSpace
    workloads: list[Workload]
    device: torch.device
    dtype: torch.dtype
    mode: str
    environment: dict[str, Any]
    note: str = ""  # for the user, of the model's own dtype
    steered: list[str] = field(default_factory=list)  # see model_latency.steered
    # See read_calibration: the calibration data, and the dense model's outputs by batch.
    batches: list[Batch] = field(default_factory=list)
    references: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.environment)

    @property
    def share(self) -> float:
        """The part of the model's parameters that the searched layers hold, biases left out."""
        held = sum(math.prod(layer.shape) for layer in self.layers)
        return held / max(count_params(self.model), 1)

    @cached_property
    def data_digest(self) -> str:
        """Of the calibration data, once they were read."""
        return data_digest(self.batches)

    def listing(self) -> dict[str, Any]:
        """What layers.json holds."""
        found = {"layers": [asdict(layer) for layer in self.layers], "skipped": self.skipped}
        return found | ({"calibration": self.data_digest} if self.batches else {})

    def cells(self) -> list[Cell]:
        return cells_for(
            self.layers, self.space, self.fingerprint, self.dtype, self.device.type, self.mode
        )


def prepare(task: Task, settings: Settings, space: SearchSpace, meta: bool = False) -> Prepared:
    """Build the dense model and list its layers.

    Args:
        meta: a model without storage (PyTorch's "meta" device), of which only cells are wanted.

    Raises:
        IncompatibleInputError: no linear layer to search, block counts that fit none, or a model
            that cannot be called with its workload.
    """
    torch.manual_seed(settings.seed)
    device, dtype = pick_device(settings.device), DTYPES[settings.dtype]
    check_mode(settings.mode, device.type)
    with torch.device("meta") if meta else nullcontext():
        workloads = workloads_of(task, settings.workload)
        model = dense_model(task)
    model.eval()
    note = _dtype_note(model, settings.dtype)
    model = move_model(model, "meta" if meta else device, dtype)
    with _noting(note):
        layers, skipped = inventory(model, workloads, space)
        odd = []
        if not meta:
            _check_steady(model, workloads)
            odd = steered(model, layers, workloads)
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:4])
        raise IncompatibleInputError(
            f"task {task.name}: no Linear layer to search in {type(model).__name__} "
            f"({reasons or 'it has none'}). Check include, exclude and output_head of the space."
        )
    space.check(layers)
    env = describe(device.type, settings.dtype)
    return Prepared(
        task, model, layers, skipped, space, workloads, device, dtype, settings.mode, env, note,
        odd,
    )  # fmt: skip


def _check_steady(model: nn.Module, workloads: Sequence[Workload]) -> None:
    """Refuse a workload for which a model returns something else at each call.

    A key/value cache in the batch grows by every call, so that its timings are of another one.
    """
    for workload in workloads:
        called = f"workload '{workload.name}'"
        one, other = (
            {k: v.clone() for k, v in output_tensors(output).items()}
            for output in (tried(model, workload.batch, called, FORMS) for _ in range(2))
        )
        if (apart := _apart(one, other, workload.batch)) is not None:
            raise IncompatibleInputError(
                f"two calls of the model with {called} gave outputs that are {apart:.2g} apart, "
                "expected the same. Either its forward draws random numbers, or it changes the "
                "batch in place (have it work on a copy), or a cache in the batch grows (give one "
                "of fixed size)."
            )


def dense_model(task: Task) -> nn.Module:
    """What a task's model() returns; of a model that torch.compile wrapped, the model itself.

    Raises:
        IncompatibleInputError: it is no module.
    """
    model = task.model()
    model = getattr(model, "_orig_mod", model)  # layers in it are replaced, and compiled anew
    if not isinstance(model, nn.Module):
        raise IncompatibleInputError(
            f"model() of task {task.name} returned a {type(model).__name__}, expected the dense "
            "model, a torch.nn.Module."
        )
    return model


def read_calibration(prepared: Prepared, seed: int) -> None:
    """Read the calibration data, once: a task may draw them, or have them but once.

    The dense model's outputs on them are computed, too: what is wrong with a batch is seen before
    minutes are spent on measuring.  Layers that they do not reach are not searched: whatever
    replaced them would look as if it cost nothing.

    Raises:
        IncompatibleInputError: no batches, or the model cannot be called with one, or returns
            nothing to judge, or something else at each call, or cannot be copied.
    """
    task, model = prepared.task, prepared.model
    with seeded(seed):  # a resumed run must see the same data
        batches = prepared.batches = as_batches(task.calibration())
    if not batches:
        raise IncompatibleInputError(
            f"calibration() of task {task.name} gave no batch, expected some."
        )
    what = f"the first batch of task {task.name}'s calibration()"
    expected = f"batches without labels: {FORMS}; of a loader of (x, y), yield x."
    held = [t for t in tree_leaves(batches[0]) if isinstance(t, Tensor) and not t.is_inference()]
    versions = [t._version for t in held]
    with _noting(prepared.note):
        output = output_tensors(tried(model, batches[0], what, expected))
        first = {name: value.clone() for name, value in output.items()}  # may be a kept buffer
        with reached(model, prepared.layers) as called:
            prepared.references = reference_outputs(model, batches)
    _check_same(first, prepared, versions != [t._version for t in held])
    _check_copy(prepared)
    missed = [layer.name for layer in prepared.layers if layer.name not in called]
    prepared.skipped = prepared.skipped | dict.fromkeys(missed, NOT_REACHED)
    prepared.layers = [layer for layer in prepared.layers if layer.name in called]
    if not prepared.layers:
        raise IncompatibleInputError(
            f"calibration() of task {task.name} reaches none of the layers to search, as "
            f"{missed[0]}. Expected batches on which the model calls them."
        )


def _check_same(first: dict[str, Tensor], prepared: Prepared, changed: bool) -> None:
    """Refuse a model whose second output for the first calibration batch is not its first.

    The search would take the difference for what replaced layers cost.

    Args:
        changed: whether the batch's tensors were written to in between.
    """
    if (apart := _apart(prepared.references[0], first, prepared.batches[0])) is None:
        return
    cause = (
        "Its forward changes the batch in place: have it work on a copy (clone)."
        if changed
        else "Its forward draws random numbers (a sample, dropout that does not ask "
        "self.training), or keeps something from call to call (a cache): switch that off in eval "
        "mode."
    )
    raise IncompatibleInputError(
        f"the dense model's outputs of two calls with the first calibration batch are {apart:.2g} "
        f"apart, expected the same. {cause}"
    )


def _apart(one: dict[str, Tensor], other: dict[str, Tensor], batch: Batch) -> float | None:
    """How far apart two outputs are that should be equal; None where they are."""
    try:
        apart = float(divergence(one, other, batch))
    except IncompatibleInputError:  # of another size
        apart = math.inf
    # Far above what the order of sums changes, far below what a layer's replacement does.
    least = max(torch.finfo(value.dtype).eps for value in one.values())
    return apart if apart > max(SAME, least / 8) else None


def _check_copy(prepared: Prepared) -> None:
    """Refuse a model whose copy does not compute what it does with layers of its own.

    Contenders are built in copies, after the search: such a copy would be as good as dense, and
    whatever is replaced in it as fast.
    """
    model = prepared.model
    twin = duplicate(model, {id(p): p for p in model.parameters()})  # costs no memory for weights
    what = "the first calibration batch once it was copied"
    with reached(model, prepared.layers) as called:
        output = output_tensors(
            tried(twin, prepared.batches[0], what, "a copy that works as well.")
        )
    apart = _apart(prepared.references[0], output, prepared.batches[0])
    if not called and apart is None:
        return
    told = f"calls the original's {next(iter(called))}" if called else f"is {apart:.2g} off"
    raise IncompatibleInputError(
        f"a copy of the model (copy.deepcopy) {told}, expected one that stands for itself. "
        "Functions that a forward or a hook holds on to, and weak references, are not copied: let "
        "them get at the model's parts through self, or through a hook's module."
    )


@contextmanager
def _noting(note: str) -> Iterator[None]:
    """Within it, errors end with a note on the model's dtype, which may be their cause."""
    try:
        yield
    except IncompatibleInputError as error:
        if not note:
            raise
        raise IncompatibleInputError(f"{error} {note}") from error


def _dtype_note(model: nn.Module, name: str) -> str:
    """That the task's model comes in another dtype than it is searched in, "" if it does not."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()} - {DTYPES[name]}
    if not found:
        return ""
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    return (
        f"The task's model comes in {names} and is searched, measured and saved in {name}; "
        "--dtype chooses another."
    )
