"""The folder of a model: saved and loaded bit-exact, and locked while a verb works on it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from blast_search.apply import attach, plan_layers
from blast_search.errors import IncompatibleInputError, UsageError
from blast_search.files import is_run, locked, make_folder, sha256_file, write_bytes
from blast_search.matrix import BlastLinear
from blast_search.plan import Plan
from blast_search.refusals import is_finite, state_of
from blast_search.space import DENSE, Candidate

WEIGHTS = "model.safetensors"
OF_A_RUN = ("model", "plans")  # folders that a run writes in its own


def save(model: nn.Module, folder: str | Path, plan: Plan | None = None) -> Path:
    """Write model.safetensors and plan.json (with the weights' sha256) into a folder.

    Args:
        plan: defaults to the plan that `apply` left on the model.

    Raises:
        IncompatibleInputError: the model carries no plan or is not what the plan makes of it, or
            holds parameters that are not finite or state that is no tensor.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    plan = plan or getattr(model, "blast_plan", None)
    if not isinstance(plan, Plan):
        raise IncompatibleInputError("the model carries no plan: call blast_search.apply first.")
    _check_applied(model, plan)
    folder = make_folder(Path(folder))
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    stored: set[int] = set()
    # Buffers may well hold infinities: a causal mask does.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in state_of(model).items():
        if name in parameters and not is_finite(value):
            raise IncompatibleInputError(f"{name} holds NaN or infinity; it is not saved.")
        # A transposed twin has the same memory and, where it is square, the same shape.
        place = value.untyped_storage().data_ptr(), value.storage_offset(), value.dtype
        key = (*place, value.shape, value.stride())
        if value.numel() and key in owners:  # tied weights are stored once
            aliases[name] = owners[key]
            continue
        owners[key] = name
        # Conjugated or negated lazily, memory holds the value of before.
        own = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if own.untyped_storage().data_ptr() in stored:  # a slice of another one, say
            own = own.clone()  # safetensors refuses memory that two tensors share
        stored.add(own.untyped_storage().data_ptr())
        tensors[name] = own
    # One entry: safetensors writes several in random order, and the digest would be random, too.
    metadata = {"aliases": json.dumps(aliases)} if aliases else {"format": "pt"}
    data = save_tensors(tensors, metadata)
    saved = replace(plan, weights_sha256=hashlib.sha256(data).hexdigest())
    # What takes time, or can fail (a full disk), does so with the old files in place.
    write_bytes(folder / f"{WEIGHTS}.new", data)
    saved.save(folder / "plan.json.new")
    (folder / "plan.json").unlink(missing_ok=True)  # beside other weights it would be refused
    os.replace(folder / f"{WEIGHTS}.new", folder / WEIGHTS)
    os.replace(folder / "plan.json.new", folder / "plan.json")
    return folder


def _check_applied(model: nn.Module, plan: Plan) -> None:
    """Refuse to save a model whose layers are not those of the plan: it could not be loaded."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, choice in plan.choices.items():
        layer = modules.get(name)
        found = None if layer is None else DENSE
        if isinstance(layer, BlastLinear):
            found = Candidate(layer.num_blocks, layer.rank)
        if found != choice:
            got = f"has {found.key}" if found else "has no such layer"
            raise IncompatibleInputError(
                f"the plan has {choice.key} for layer {name}, the {type(model).__name__} {got}. "
                "Save the model that blast_search.apply made by this plan."
            )


def load(folder: str | Path, model_factory: Callable[[], nn.Module]) -> nn.Module:
    """The saved model: `model_factory()` builds the dense one, its layers are replaced, and all
    weights come from the folder (bit-exact).

    Raises:
        IncompatibleInputError: no such folder, a damaged or foreign weight file (also a pickle),
            a digest that does not match, weights that are not finite, another model, or one
            without memory for its tensors.
    """
    folder = Path(folder)
    plan = Plan.load(folder)
    tensors = read_weights(folder / WEIGHTS, plan.weights_sha256)
    model = model_factory()
    _check_memory(model)
    layers = plan_layers(model, plan, finite=False)  # factories may leave weights uninitialised
    modules: dict[str, nn.Module] = {}
    for layer in layers:
        choice = plan.choices[layer.name]
        if not choice.is_dense:
            linear = model.get_submodule(layer.name)
            modules[layer.name] = BlastLinear.empty_like(linear, choice.num_blocks, choice.rank)
    attach(model, layers, modules, plan)
    _make_room(model, tensors)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in tensors.items()}
    if expected != found:
        odd = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise IncompatibleInputError(
            f"{folder}: weights do not fit the model: {', '.join(odd[:5])} "
            f"({len(odd)} differ). Use the model_factory the plan was made with."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in tensors.items():
        if name in parameters and not is_finite(value):
            raise IncompatibleInputError(f"{folder / WEIGHTS}: {name} holds NaN or infinity.")
    built = {p.dtype for p in parameters.values() if p.is_floating_point()}
    kept = {tensors[name].dtype for name in parameters if tensors[name].is_floating_point()}
    if len(kept) == 1 and kept != built:  # the model was cast, and with it what is not saved
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(next(iter(kept)))
    for name, value in model.state_dict(keep_vars=True).items():
        value.data = value.data.to(tensors[name].dtype)  # or it would be rounded
    model.load_state_dict(tensors)
    return model


def _make_room(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Buffers that the saved model had made in its first call, and a new one still has as None."""
    modules = dict(model.named_modules())
    for name in tensors.keys() - model.state_dict().keys():
        path, _, own = name.rpartition(".")
        if path in modules and modules[path]._buffers.get(own, name) is None:
            device = next(iter(model.parameters())).device
            modules[path]._buffers[own] = tensors[name].to(device, copy=True)


def _check_memory(model: nn.Module) -> None:
    """Refuse a model whose tensors have no memory yet, into which nothing can be loaded."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    empty = [name for name, tensor in tensors.items() if is_lazy(tensor) or tensor.is_meta]
    if empty:
        raise IncompatibleInputError(
            f"the model of the model_factory has no memory for {len(empty)} tensors, as for "
            f"{', '.join(empty[-3:])}. Build it on a real device, not on 'meta'; where it has "
            "lazy layers, run one batch through it in the factory."
        )


def read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, its digest checked."""
    if not path.is_file():
        raise IncompatibleInputError(f"{path} does not exist. Check the folder.")
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            aliases = json.loads((stream.metadata() or {}).get("aliases", "{}"))
    except (SafetensorError, ValueError) as error:
        raise IncompatibleInputError(
            f"{path} is not a safetensors file ({error}). blast-search never reads pickles; "
            "save the model again with blast_search.save."
        ) from error
    if sha256_file(path) != sha256:
        raise IncompatibleInputError(
            f"{path}: the sha256 differs from the one in plan.json, so the weights were changed "
            "or damaged. Restore the folder, or apply the plan again."
        )
    return tensors | {name: tensors[owner] for name, owner in aliases.items()}


@contextmanager
def leaving(target: Path, source: Path | None = None) -> Iterator[None]:
    """Hold the lock of the folder that a model goes to.

    A new folder is made at once, so that one that cannot be written is told before the work; it
    goes again if the work fails.  The lock's file goes in any case: a model folder is copied and
    shipped, and holds the model only.

    Args:
        source: the folder that the model comes from.  It may be the target, also where it is a
            run's: it was named to be changed.

    Raises:
        UsageError: what a run has written would be lost.
        RunLockedError: the folder, or the run that it belongs to, is in use.
    """
    here = target.resolve()
    inside = here.name in OF_A_RUN and is_run(here.parent)
    if is_run(here) or (inside and (source is None or here != source.resolve())):
        run = target if is_run(here) else target.parent
        raise UsageError(
            f"{target} holds what a run has written. Choose another --out; the run's own model "
            f"is in {run / 'model'}."
        )
    if (here / WEIGHTS).exists() and not (here / "plan.json").exists():
        raise UsageError(
            f"{target} holds a {WEIGHTS} that blast-search has not written. Choose another --out."
        )
    made = [folder for folder in (here, *here.parents) if not folder.exists()]
    with locked(here.parent if inside else make_folder(target)):
        try:
            yield
        except BaseException:
            _unlock(here, inside)
            with suppress(OSError):  # it holds something
                for folder in made:
                    folder.rmdir()
            raise
        _unlock(here, inside)


def _unlock(folder: Path, inside: bool) -> None:
    if not inside:  # a run keeps its own
        (folder / ".lock").unlink(missing_ok=True)
