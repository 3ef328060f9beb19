"""Plan -> edited model (modelfolder.py saves and loads it)."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from blast_search.batches import Batch
from blast_search.calibrate import as_batches, collect_grams
from blast_search.errors import IncompatibleInputError, in_one_line
from blast_search.factorize import SWEEPS
from blast_search.files import sha256_json
from blast_search.fitting import Fitter
from blast_search.layers import dense_weight, is_linear, set_modules
from blast_search.matrix import BlastLinear
from blast_search.plan import Plan
from blast_search.refusals import (
    hooked,
    is_finite,
    refuse_wrapped,
    tied,
    unlike_linear,
    weight_owners,
)
from blast_search.space import Call, LayerSpec


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
