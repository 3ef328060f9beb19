"""One pass over calibration data -> the Gram E[x x^T] of every layer's inputs."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from blast_search.batches import FORMS, Batch, call_model, calling, evaluating, to_device
from blast_search.errors import IncompatibleInputError
from blast_search.fused import unfused
from blast_search.layers import get_modules
from blast_search.outputs import token_mask
from blast_search.space import LayerSpec

Read = tuple[int, int]  # which tensor, and how often it was changed; see _Pass.read


def as_batches(calibration: Any) -> list[Batch]:
    """Calibration data as a list of batches.

    Raises:
        IncompatibleInputError: one batch where several are expected, of which the rows or the keys
            would be taken for batches, or nothing to iterate over.
    """
    single = isinstance(calibration, Tensor | Mapping | str)
    # Not isinstance(_, Iterable): a map-style Dataset only has __getitem__.
    if single or not (hasattr(calibration, "__iter__") or hasattr(calibration, "__getitem__")):
        raise IncompatibleInputError(
            f"the calibration data are a {type(calibration).__name__}, expected a list or another "
            f"iterable of batches, each {FORMS}. Put a single batch into a list."
        )
    return list(calibration)


def data_digest(batches: Sequence[Batch]) -> str:
    """Digest of the values in calibration batches: what losses on file are true of."""
    digest = hashlib.sha256()
    for value in tree_leaves(list(batches)):
        if isinstance(value, Tensor) and value.layout is torch.strided:
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def reached(model: nn.Module, layers: Sequence[LayerSpec]) -> Iterator[set[str]]:
    """Within it, the names of layers that are called with anything but zeros are collected.

    An expert that no token is routed to may be called with no rows, or not at all.
    """
    names: set[str] = set()

    def record(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if name not in names and bool((args[0] if args else next(iter(kwargs.values()))).any()):
            names.add(name)

    hooks = [
        module.register_forward_pre_hook(partial(record, name), with_kwargs=True)
        for name, module in get_modules(model, layers).items()
    ]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def collect_grams(
    model: nn.Module, layers: Sequence[LayerSpec], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Run the calibration batches and average x x^T over real tokens, of all calls of a layer.

    Layers that always read the same tensors (query, key, value; gate, up) share one Gram.

    Returns:
        Layer name -> (n, n) float32 on the CPU; a layer that no batch reached is left out.

    Raises:
        IncompatibleInputError: no batches, one that the model cannot be called with, or an input
            that is not finite (names the layer).
    """
    if not batches:
        raise IncompatibleInputError("calibration() of the task gave no batch, expected some.")
    modules = get_modules(model, layers)
    # Layers share by their first call, as a Gram of each would be too much memory.  Where later
    # calls differ, the pass begins anew with such layers in different families (rare).
    families: dict[str, int] = dict.fromkeys(modules, 0)
    while True:
        attempt = _Pass(families)
        hooks = [
            module.register_forward_pre_hook(partial(attempt.record, name), with_kwargs=True)
            for name, module in modules.items()
        ]
        try:
            with evaluating(model), unfused():
                as_one = all(attempt.run(model, *item) for item in enumerate(batches))
        finally:
            for hook in hooks:
                hook.remove()
        if as_one:
            return attempt.averages()


class _Pass:
    """Grams of a run over the batches: one for each group of layers that read the same.

    Args:
        families: by layer; layers of different families never share.  `run` splits them further.
    """

    def __init__(self, families: dict[str, int]) -> None:
        self.families = families
        self.leaders: dict[str, str] = {}  # by layer, the one whose Gram it shares (or itself)
        self.grams: dict[str, Tensor] = {}
        self.counts: dict[str, int] = defaultdict(int)
        self.batch: Batch = None
        # Of the current batch: what each layer read, call by call; the layer that was first to
        # read something in its first call.
        self.reads: dict[str, list[Read]] = defaultdict(list)
        self.first: dict[tuple[Read, int], str] = {}
        # Numbers of tensors: ids are used again once the model has let go of one.  Holding them
        # all would take the memory of every layer's input.
        self.numbers = WeakTensorKeyDictionary()
        self.count = itertools.count()

    def run(self, model: nn.Module, index: int, batch: Batch) -> bool:
        """Add a batch; False, with families split, where layers of a group read differently."""
        self.batch = batch
        with calling(f"calibration batch {index}", f"batches without labels: {FORMS}."):
            call_model(model, to_device(batch, model))
        odd = False
        split: dict[tuple[str, tuple[Read, ...]], int] = {}
        for name, leader in self.leaders.items():
            if self.reads[name] != self.reads[leader]:
                odd = True
                key = leader, tuple(self.reads[name])
                fresh = max(self.families.values()) + 1
                self.families[name] = split.setdefault(key, fresh)
        self.reads.clear()
        self.first.clear()
        return not odd

    def record(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A call of a layer."""
        x = args[0] if args else next(iter(kwargs.values()))
        read = self.read(x)
        if name not in self.leaders:
            self.leaders[name] = self.first.setdefault((read, self.families[name]), name)
        self.reads[name].append(read)
        if self.leaders[name] == name:
            self.add(name, x)

    def read(self, x: Tensor) -> Read:
        """What tells an input from the others of this batch: x += 1 makes another one of x."""
        if x.is_inference():  # whose changes are not counted: each call is another input
            return next(self.count), 0
        if x not in self.numbers:
            self.numbers[x] = next(self.count)
        return self.numbers[x], x._version

    def add(self, name: str, x: Tensor) -> None:
        """Add the rows of an input (..., n) to the sum of a leader."""
        mask = token_mask(self.batch, tuple(x.shape), x.dim() == 2) if x.dim() > 1 else None
        rows = (x if mask is None else x[mask.to(x.device)]).reshape(-1, x.shape[-1]).float()
        # On the CPU: those of a large language model would fill its GPU.
        gram = (rows.T @ rows).cpu()
        if not bool(gram.diagonal().sum().isfinite()):
            raise IncompatibleInputError(
                f"layer {name}: its input on the calibration data holds NaN or infinity. "
                "Check the calibration batches."
            )
        self.grams[name] = self.grams[name].add_(gram) if name in self.grams else gram
        self.counts[name] += len(rows)

    def averages(self) -> dict[str, Tensor]:
        """The Gram of every layer that was called; not to be added to afterwards."""
        for name, gram in self.grams.items():
            gram.div_(max(self.counts[name], 1))
        return {name: self.grams[leader] for name, leader in self.leaders.items()}
