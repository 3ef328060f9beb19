"""Plan -> edited model; saved and loaded bit-exact."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from blast_search.batches import Batch
from blast_search.calibrate import as_batches, collect_grams
from blast_search.errors import IncompatibleInputError, in_one_line
from blast_search.factorize import SWEEPS
from blast_search.files import make_folder, sha256_file, sha256_json, write_bytes
from blast_search.fitting import Fitter
from blast_search.layers import dense_weight, is_linear, set_modules
from blast_search.matrix import BlastLinear
from blast_search.plan import Plan
from blast_search.refusals import (
    hooked,
    is_finite,
    refuse_wrapped,
    state_of,
    tied,
    unlike_linear,
    weight_owners,
)
from blast_search.space import Call, LayerSpec

WEIGHTS = "model.safetensors"


def model_fingerprint(model: nn.Module) -> str:
    """Digest of the names and shapes of all parameters (not their values)."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    return sha256_json(shapes)[:16]


def plan_layers(model: nn.Module, plan: Plan, finite: bool = True) -> list[LayerSpec]:
    """The plan's layers as they are in the model.

    Args:
        finite: whether weights must be; not where others take their place.

    Raises:
        IncompatibleInputError: a layer is missing, has another shape, is no linear layer, was
            replaced already, is not finite, or is to be replaced and has hooks or a weight of
            another module, which it would lose; or the model is compiled or scripted.
    """
    refuse_wrapped(model)
    owners = weight_owners(model)
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    by_name = dict(model.named_modules(remove_duplicate=False))
    layers, choices = [], plan.choices
    for name, item in plan.layers.items():
        module = by_name.get(name)
        if module is None:
            raise IncompatibleInputError(
                f"the plan is for another model: it names layer {name}, which "
                f"{type(model).__name__} does not have. Use the model the plan was made for "
                f"({plan.model.get('name', 'unknown')})."
            )
        if isinstance(module, BlastLinear):
            raise IncompatibleInputError(
                f"layer {name} is a BlastLinear already. Apply plans to the dense model."
            )
        if not is_linear(module):
            raise IncompatibleInputError(
                f"layer {name} is a {type(module).__name__}, expected a linear layer"
                f"{f': {why}' if (why := unlike_linear(module)) else ''}."
            )
        weight = dense_weight(module)
        if tuple(weight.shape) != (item.out_features, item.in_features):
            raise IncompatibleInputError(
                f"layer {name} is {weight.shape[0]} x {weight.shape[1]}, the plan expects "
                f"{item.out_features} x {item.in_features}: it was made for another model."
            )
        why = tied(paths[module][0], module, owners) or hooked(module)
        if why and not choices[name].is_dense:
            raise IncompatibleInputError(
                f"layer {name}: {why}, which would be lost with the layer. Remove that from the "
                "model, or the layer from the plan."
            )
        if finite and not is_finite(weight):
            raise IncompatibleInputError(f"layer {name}: its weight holds NaN or infinity.")
        m, n = weight.shape
        aliases = tuple(path for path in paths[module] if path != name)
        layers.append(LayerSpec(name, n, m, module.bias is not None, (Call(1),), aliases))
    return layers


def apply(model: nn.Module, plan: Plan, calibration: Iterable[Batch] | None = None) -> nn.Module:
    """Replace the plan's layers, in place; the model is also returned.

    Everything is checked, and every factor computed, before the first module is touched.

    Args:
        calibration: batches that make the factors activation-aware; without them each weight is
            approximated for its own sake, which costs quality.

    Raises:
        IncompatibleInputError: the plan does not fit the model, or a calibration batch.
    """
    layers = plan_layers(model, plan)
    chosen = [layer for layer in layers if not plan.choices[layer.name].is_dense]
    batches = None if calibration is None else as_batches(calibration)
    grams = {} if batches is None else collect_grams(model, chosen, batches)
    ranks = {layer.name: plan.choices[layer.name].rank for layer in chosen}
    fitter = Fitter(model, chosen, grams, ranks)
    modules = final_modules(fitter, {name: plan.choices[name] for name in ranks})
    attach(model, layers, modules, plan)
    return model


def final_modules(fitter: Fitter, choices: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Modules with factors of final quality (more sweeps than during the search)."""
    return fitter.modules(choices, SWEEPS)


def copied(model: nn.Module, layers: Sequence[LayerSpec], replaced: Container[str]) -> nn.Module:
    """A copy of a model that shares the weights of layers which are to be replaced in it."""
    chosen = [layer for layer in layers if layer.name in replaced]
    paths = {path for layer in chosen for path in (layer.name, *layer.aliases)}
    going: dict[int, nn.Parameter] = {}
    staying: set[int] = set()  # also what a replaced layer and another one have in common
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name == path or name.startswith(f"{path}.") for path in paths)
        for parameter in module.parameters(recurse=False):
            if inside:
                going[id(parameter)] = parameter
            else:
                staying.add(id(parameter))
    memo: dict[int, Any] = {key: p for key, p in going.items() if key not in staying}
    return duplicate(model, memo)


def duplicate(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model.

    Args:
        memo: what the copy shares with the model, by id (see copy.deepcopy).

    Raises:
        IncompatibleInputError: the model holds what cannot be copied, such as a lock or a file.
    """
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise IncompatibleInputError(
            f"{type(model).__name__} cannot be copied: {in_one_line(error)}. Expected a model "
            "that copy.deepcopy takes: keep locks, open files and the like out of it, or leave "
            "them out of its __getstate__."
        ) from error


def attach(
    model: nn.Module, layers: list[LayerSpec], modules: Mapping[str, nn.Module], plan: Plan
) -> None:
    """Put fitted modules in place and remember the plan on the model (`model.blast_plan`)."""
    set_modules(model, layers, modules)
    model.blast_plan = plan  # type: ignore[assignment]


def save(model: nn.Module, folder: str | Path, plan: Plan | None = None) -> Path:
    """Write model.safetensors and plan.json (with the weights' sha256) into a folder.

    Args:
        plan: defaults to the plan that `apply` left on the model.

    Raises:
        IncompatibleInputError: the model carries no plan, or holds parameters that are not finite
            or state that is no tensor.
    """
    plan = plan or getattr(model, "blast_plan", None)
    if not isinstance(plan, Plan):
        raise IncompatibleInputError("the model carries no plan: call blast_search.apply first.")
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
        own = value.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in stored:  # a slice of another one, say
            own = own.clone()  # safetensors refuses memory that two tensors share
        stored.add(own.untyped_storage().data_ptr())
        tensors[name] = own
    # One entry: safetensors writes several in random order, and the digest would be random, too.
    metadata = {"aliases": json.dumps(aliases)} if aliases else {"format": "pt"}
    data = save_tensors(tensors, metadata)
    fresh = folder / f"{WEIGHTS}.new"
    write_bytes(fresh, data)  # what can fail (a full disk) fails with the old files in place
    (folder / "plan.json").unlink(missing_ok=True)  # beside other weights it would be refused
    os.replace(fresh, folder / WEIGHTS)
    saved = replace(plan, weights_sha256=sha256_file(folder / WEIGHTS))
    saved.save(folder / "plan.json")
    return folder


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
