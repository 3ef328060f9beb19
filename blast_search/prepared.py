"""A task ready to be searched: its dense model on the device, its layers, its workloads."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from blast_search.batches import FORMS, Batch, move_model, tried
from blast_search.errors import IncompatibleInputError
from blast_search.evaluate import Task, workloads_of
from blast_search.latency import cells_for, describe, fingerprint
from blast_search.layers import Workload, inventory
from blast_search.modes import check_mode
from blast_search.outputs import output_tensors
from blast_search.settings import DTYPES, Settings, pick_device
from blast_search.space import LayerSpec, SearchSpace
from blast_search.tables import Cell


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
    batches: list[Batch] = field(default_factory=list)  # calibration data; see read_calibration

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.environment)

    def cells(self) -> list[Cell]:
        return cells_for(
            self.layers, self.space, self.fingerprint, self.dtype, self.device.type, self.mode
        )


def prepare(task: Task, settings: Settings, space: SearchSpace, meta: bool = False) -> Prepared:
    """Build the dense model and list its layers.

    Args:
        meta: a model without storage (PyTorch's "meta" device), of which only cells are wanted.

    Raises:
        IncompatibleInputError: no linear layer to search, block counts that fit none, a model
            that cannot be called with its workload.
    """
    torch.manual_seed(settings.seed)
    device, dtype = pick_device(settings.device), DTYPES[settings.dtype]
    check_mode(settings.mode, device.type)
    with torch.device("meta") if meta else nullcontext():
        workloads = workloads_of(task, settings.workload)
        model = task.model().eval()
    note = _dtype_note(model, settings.dtype)
    model = move_model(model, "meta" if meta else device, dtype)
    layers, skipped = inventory(model, workloads, space)
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:4])
        raise IncompatibleInputError(
            f"task {task.name}: no Linear layer to search in {type(model).__name__} "
            f"({reasons or 'it has none'}). Check include, exclude and output_head of the space."
        )
    space.check(layers)
    env = describe(device.type, settings.dtype)
    return Prepared(
        task, model, layers, skipped, space, workloads, device, dtype, settings.mode, env, note
    )


def read_calibration(prepared: Prepared, seed: int) -> None:
    """Read the calibration data, once: a task may draw them, or have them but once.

    The model is called with the first batch: a form that is wrong is seen before minutes are spent
    on measuring.

    Raises:
        IncompatibleInputError: no batches, or the model cannot be called with the first one, or
            returns nothing to judge.
    """
    task = prepared.task
    torch.manual_seed(seed)  # a resumed run must see the same data
    prepared.batches = list(task.calibration())
    if not prepared.batches:
        raise IncompatibleInputError(
            f"calibration() of task {task.name} gave no batch, expected some."
        )
    what = f"the first batch of task {task.name}'s calibration()"
    expected = f"batches without labels: {FORMS}; of a loader of (x, y), yield x."
    output_tensors(tried(prepared.model, prepared.batches[0], what, expected))


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
