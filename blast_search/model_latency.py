"""How long whole models take: the dense model, its skeleton and variants, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from blast_search.batches import call_model, evaluating, to_device
from blast_search.errors import IncompatibleInputError, in_one_line
from blast_search.latency import MIN_ROUNDS, interleave, synchronizer
from blast_search.layers import Workload, get_modules, set_modules, stubs, swapped, trace
from blast_search.modes import COLD, shared_pool, timed_call
from blast_search.noise import half_width, median_interval
from blast_search.plan import Choices
from blast_search.space import Candidate, LayerSpec
from blast_search.structured import empty_layer

MODEL_ROUNDS = 40
NARROW = 0.005  # half-width of every ratio to dense, relative: enough rounds
# Beyond this a budget would be met or missed by chance, and the search would chase noise: seen
# with smollm2 beside another program, whose intervals were 6 to 12 % wide either way.
UNCERTAIN = 0.04
ATTEMPTS = 2
STEERED = (
    "the model calls {} of the layers otherwise where values are others (such as {}): plans are "
    "timed with fitted factors, and predictions are rough"
)


@dataclass(frozen=True)
class Timing:
    """Measured whole-model latency of one variant against dense, in milliseconds and ratios.

    ratio_layers = (variant - fixed) / (dense - fixed), fixed being the time of the model with
    its searched layers stubbed out; 1 where these take no measurable time.  Ratios are medians of
    the ratios of each round, in which drift cancels; ci95 are percentile bootstrap intervals over
    rounds.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    ci95_ms: tuple[float, float]
    dense_ms: float
    fixed_ms: float
    ratio_layers: float
    ratio_layers_ci95: tuple[float, float]
    ratio_model: float
    ratio_model_ci95: tuple[float, float]
    # ratio_layers of each workload alone; None where the searched layers take no time in it
    by_workload: tuple[float | None, ...] = ()

    @property
    def worst(self) -> float:
        """The largest ratio_layers over the workloads that the searched layers take time in."""
        return max((r for r in self.by_workload if r is not None), default=self.ratio_layers)


def untrained(
    model: nn.Module, layers: Sequence[LayerSpec], plan: Choices
) -> dict[str, nn.Module]:
    """Modules of a plan with random factors, to be timed: values do not change the time, but of
    models that are `steered` by them."""
    dense = get_modules(model, layers)
    return {name: empty_layer(dense[name], c) for name, c in plan.items() if not c.is_dense}


def steered(
    model: nn.Module, layers: Sequence[LayerSpec], workloads: Sequence[Workload]
) -> list[str]:
    """The layers that a model calls otherwise once its layers' values are others.

    A model that iterates until it converges, leaves early, or routes tokens takes as long as its
    values say: plans with random factors would be another amount of work.
    """
    modules = untrained(model, layers, {layer.name: Candidate(1, 1) for layer in layers})
    try:
        with swapped(model, layers, modules):
            calls, _ = trace(model, list(modules.values()), workloads)
    except IncompatibleInputError:  # some step of it does not even take such values
        return [layer.name for layer in layers]
    return [layer.name for layer in layers if calls[modules[layer.name]] != layer.calls]


def check_calls(model: nn.Module, workloads: Sequence[Workload], mode: str) -> None:
    """Compile or capture the dense model, to see before anything is measured whether it can be.

    Raises:
        IncompatibleInputError: it cannot.
    """
    if mode.removesuffix(COLD) == "eager":
        return
    for share in workloads:
        batch = to_device(share.batch, model)
        try:
            with evaluating(model), torch.inference_mode():
                timed_call(mode, model, partial(call_model, batch=batch))()
        except Exception as error:
            raise IncompatibleInputError(
                f"workload '{share.name}' cannot be timed in mode {mode}: {in_one_line(error)}. "
                "Keep what the mode cannot take out of the model's forward (a value that Python "
                "reads from a tensor, say), or use --mode eager."
            ) from error


def time_variants(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    variants: Mapping[str, Mapping[str, nn.Module]],
    workloads: Sequence[Workload],
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MODEL_ROUNDS,
    mode: str = "eager",
) -> dict[str, Timing]:
    """Time the dense model, its skeleton and its variants, interleaved in one process.

    Args:
        model: the dense model; left as it was.
        variants: per name, the modules that replace layers (others stay dense).  One that
            replaces none is the dense model, not timed again: its ratios are exactly 1.
        seconds: for all rounds together, within `min_rounds` and `max_rounds`; fewer rounds do
            where all ratios to dense are certain to NARROW, and up to ATTEMPTS times as many are
            made where one is uncertain by more than UNCERTAIN.
    """
    device = next(model.parameters()).device
    before = get_modules(model, layers)
    sets = {"dense": before, "fixed": stubs(before)} | {
        name: before | dict(modules) for name, modules in variants.items() if modules
    }
    timed_as = {name: name if modules else "dense" for name, modules in variants.items()}
    total: dict[str, np.ndarray] = {}
    alone: list[dict[str, np.ndarray]] = []
    # Moved while the dense layers are in place: what replaces them may be without parameters.
    batches = [to_device(share.batch, model) for share in workloads]
    with evaluating(model), swapped(model, layers, before):
        for share, batch in zip(workloads, batches, strict=True):

            def prepare(name: str) -> None:
                set_modules(model, layers, sets[name])

            def call(mine: nn.Module, batch: Any = batch) -> object:
                return call_model(mine, batch)

            with torch.inference_mode():
                calls, pool = {}, shared_pool(mode)
                for name in sets:
                    prepare(name)
                    calls[name] = timed_call(mode, model, call, pool)
                parts: list[dict[str, np.ndarray]] = []
                while len(parts) < ATTEMPTS and (not parts or _wide(_joined(parts))):
                    times = interleave(
                        calls,
                        synchronizer(device),
                        seconds / len(workloads),
                        min_rounds,
                        max_rounds,
                        prepare=prepare,
                        # The first call after a swap warms caches; the faster one also sheds
                        # most interruptions by other programs.
                        best_of=2,
                        enough=_narrow,
                    )
                    parts.append(times)
            times = _joined(parts)
            alone.append(times)
            rounds = min(map(len, [*times.values(), *total.values()]))  # those that all have
            total = {
                name: (total[name][:rounds] if total else 0.0)
                + values[:rounds] * share.weight / 1e3
                for name, values in times.items()
            }
    called = [any(_in(share, layer) for layer in layers) for share in workloads]
    return {
        name: replace(
            _timing(total, same),
            by_workload=tuple(
                _ratio_alone(times, same) if there else None
                for there, times in zip(called, alone, strict=True)
            ),
        )
        for name, same in {"dense": "dense", **timed_as}.items()
    }


def _in(workload: Workload, layer: LayerSpec) -> bool:
    """Whether a layer is called in the workload; calls without a name may be of any."""
    return any(call.workload in ("", workload.name) for call in layer.calls)


def _ratio_alone(times: Mapping[str, np.ndarray], name: str) -> float | None:
    ratios = _layer_ratios(times, name)
    return None if np.isnan(ratios).all() else float(np.nanmedian(ratios))


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All rounds of several series."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _wide(times: Mapping[str, np.ndarray]) -> bool:
    """Whether a variant's ratio to dense, layers alone, is uncertain."""
    ratios = (_layer_ratios(times, n) for n in times if n not in ("dense", "fixed"))
    finite = [r[np.isfinite(r)] for r in ratios]
    return any(half_width(median_interval(r)) > UNCERTAIN for r in finite if len(r))


def _layer_ratios(times: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """(variant - fixed) / (dense - fixed) of every round; NaN where other load upset it."""
    mine, dense, fixed = times[name], times["dense"], times["fixed"]
    return (mine - fixed) / np.where(dense > fixed, dense - fixed, np.nan)  # type: ignore[no-any-return]


def _narrow(samples: Mapping[str, Sequence[float]]) -> bool:
    dense = np.array(samples["dense"])
    return all(
        half_width(median_interval(np.array(values) / dense)) <= NARROW
        for name, values in samples.items()
        if name != "dense"
    )


def _timing(times: Mapping[str, np.ndarray], name: str) -> Timing:
    mine, dense, fixed = times[name], times["dense"], times["fixed"]
    dense_ms, fixed_ms = float(np.median(dense)), float(np.median(fixed))
    # Layers that take no measurable time have none to save: whatever replaces them is no faster.
    layers = _layer_ratios(times, name) if dense_ms > fixed_ms else np.ones(len(mine))
    model = mine / dense
    picks = np.random.default_rng(0).integers(0, len(mine), (500, len(mine)))

    def interval(values: np.ndarray) -> tuple[float, float]:
        low, high = np.nanpercentile(np.nanmedian(values[picks], axis=1), (2.5, 97.5))
        return float(low), float(high)

    p10, p50, p90 = (float(v) for v in np.percentile(mine, (10, 50, 90)))
    return Timing(
        p50, p10, p90, len(mine), interval(mine), dense_ms, fixed_ms,
        float(np.nanmedian(layers)), interval(layers), float(np.median(model)), interval(model),
    )  # fmt: skip
