"""A plan for another budget, from the tables of a run; nothing is measured for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from blast_search.document import number, pick
from blast_search.engine import Engine
from blast_search.errors import IncompatibleInputError, InfeasibleBudgetError, UsageError
from blast_search.evaluate import size_ratios
from blast_search.files import read_json, read_json_object, read_yaml_mapping
from blast_search.last_timing import why_no_faster
from blast_search.latency import fingerprint
from blast_search.latency_model import LatencyModel
from blast_search.plan import Choices, LayerPlan, Plan
from blast_search.progress import SILENT
from blast_search.runfolder import RunFolder
from blast_search.space import Call, Candidate, LayerSpec, SearchSpace, kept_space
from blast_search.tables import LatencyTable, Score, ScoreTable


def plan_at(run: Path, ratio: float) -> Plan:
    """The exact plan of a run for another layer ratio; of a uniform space, the best uniform one.

    Raises:
        InfeasibleBudgetError: no plan has so small a predicted ratio; `nearest` is the fastest.
        IncompatibleInputError: a file of the run is missing or damaged.
    """
    base = Plan.load(run / "plan.json")
    engine = engine_on_file(run, base)
    try:
        choices = engine.exact(ratio)
    except KeyError:
        raise IncompatibleInputError(
            f"{run / 'latency.csv'} has no cells for some layers of layers.json. Restore it, "
            f"or measure them again with --resume {run}."
        ) from None
    except InfeasibleBudgetError:
        choices = engine.fastest()
        smallest = engine.predicted_ratio(choices) or 0.0
        error = InfeasibleBudgetError(
            f"no plan has a predicted layer ratio of {ratio:g}; the smallest is "
            f"{math.ceil(1000 * smallest) / 1000:.3f}: "  # rounded up: it can be asked for
            f"{why_no_faster(choices)}."
        )
        error.nearest = _plan(base, engine, ratio, choices)
        raise error from None
    return _plan(base, engine, ratio, choices)


def _plan(base: Plan, engine: Engine, ratio: float, choices: Choices) -> Plan:
    """Choices for a layer ratio as a plan of the run of `base`, with what is predicted of it."""
    reached, every = engine.latency.total(choices), list(engine.latency.workloads)
    macs, params = number(pick(base.model, "macs")), number(pick(base.model, "params"))
    sizes = size_ratios(engine.layers, choices, int(params or 0), macs or 0.0)
    return replace(
        base,
        layers={ly.name: LayerPlan.of(ly, choices[ly.name]) for ly in engine.layers},
        budget={"value": ratio, "scope": "layers", "max_drop": None}
        | ({"every_workload": every} if every else {}),
        predicted={
            "latency_ms": latency_ms(base, reached),
            "latency_ratio_layers": reached,
            "latency_ratio_model": model_ratio(base, reached),
            "macs_ratio": sizes[0] if macs else None,
            "params_ratio": sizes[1] if params else None,
            "score_increase": engine.predicted_loss(choices),
        },
        measured={},
        baselines={},
        search={"optimality_gap": engine.gap}
        | {key: base.search.get(key) for key in ("solver", "trials", "seed", "workload")},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        weights_sha256="",
    )


def latency_ms(base: Plan, layer_ratio: float | None) -> float | None:
    """The model's latency at a layer ratio, by the times that the run measured; None: unknown."""
    dense = number(pick(base.measured, "dense_latency_ms"))
    fixed = number(pick(base.measured, "fixed_latency_ms"))
    if layer_ratio is None or dense is None or fixed is None:
        return None
    return fixed + layer_ratio * (dense - fixed)


def model_ratio(base: Plan, layer_ratio: float | None) -> float | None:
    """As `latency_ms`, relative to the dense model's."""
    ms = latency_ms(base, layer_ratio)
    return None if ms is None else ms / float(base.measured["dense_latency_ms"])


@dataclass(frozen=True)
class ScoresOnFile:
    """scores.csv in the place of the search's scorer: linear between the candidates on file."""

    scores: Mapping[str, Mapping[Candidate, Score]]

    def score(self, layer: LayerSpec, candidate: Candidate) -> Score:
        known = self.scores.get(layer.name, {})
        if candidate.is_dense or not known:
            return Score(0.0, 0.0)
        if candidate in known:
            return known[candidate]
        # A block count of which none is faster than dense here has no scores: those of the others.
        same = [c for c in known if c.num_blocks == candidate.num_blocks] or list(known)
        points = sorted((layer.params(c), known[c].error, known[c].loss) for c in same)
        sizes, errors, losses = zip(*points, strict=True)
        at = layer.params(candidate)
        return Score(float(np.interp(at, sizes, errors)), float(np.interp(at, sizes, losses)))


def engine_on_file(run: Path, base: Plan) -> Engine:
    """The engine of a run, as far as it solves and predicts: it has no model to measure."""
    if lost := [n for n in ("latency.csv", "scores.csv") if not (run / n).is_file()]:
        raise IncompatibleInputError(
            f"{run} has no {' and no '.join(lost)}. Restore the folder, or search again."
        )
    scores = ScoreTable.read(run / "scores.csv")
    factors = {int(b): float(f) for b, f in (base.search.get("factors") or {}).items()}
    latency = LatencyModel(
        read_layers(run), settled_table(run), float(base.search.get("correction") or 1.0),
        factors, base.budget.get("every_workload") or [],
    )  # fmt: skip
    scorer: Any = ScoresOnFile(scores.scores)
    nothing: Any = None
    return Engine(
        model=nothing, layers=list(latency.layers), space=space_of(run), workloads=(),
        panel=nothing, latency=latency, scorer=scorer, scores=scores, run=nothing, report=SILENT,
    )  # fmt: skip


def settled_table(run: Path) -> LatencyTable:
    """latency.csv with the doubtful cells that the search measured again (Pipeline.settle)."""
    table = LatencyTable.open(
        run / "latency.csv", fingerprint(read_json_object(run / "environment.json"))
    )
    again = LatencyTable(table.device)
    for (kind, _), rows in RunFolder.open(run).measured.items():
        if kind == "doubtful cells":
            again.add_rows(rows, f"{run / 'measured.csv'}, doubtful cells")
    table.path = None  # the file stays as it is
    table.merge(again)
    return table


def space_of(run: Path) -> SearchSpace:
    """The search space of a run."""
    name = str(read_yaml_mapping(run / "config.yaml").get("space", "default"))
    try:
        return kept_space(run, name)
    except UsageError as error:  # an older run, whose space is not in the folder
        raise IncompatibleInputError(
            f"{run} was searched in a space that is not found any more: {error} Put it back, or "
            "call from the folder where the run began."
        ) from error


def read_layers(run: Path) -> list[LayerSpec]:
    """layers.json as LayerSpecs.

    Raises:
        IncompatibleInputError: no such file, or a damaged one.
    """
    path = run / "layers.json"
    try:
        return [
            LayerSpec(
                **(item | {"calls": tuple(Call(**c) for c in item["calls"])}
                   | {"aliases": tuple(item["aliases"])})
            )
            for item in read_json(path)["layers"]
        ]  # fmt: skip
    except (KeyError, TypeError) as error:
        raise IncompatibleInputError(
            f"{path} is damaged ({type(error).__name__}: {error}), expected the layers as "
            "blast-search wrote them. Restore the file from a copy, or measure in a new folder."
        ) from error


def check_layers(run: Path, layers: Sequence[LayerSpec], calibration: str) -> None:
    """Refuse to continue a run with other layers or data: what is on file is true of its own.

    Args:
        calibration: the digest of the calibration data (calibrate.data_digest).

    Raises:
        IncompatibleInputError: layers.json has others.
    """
    if not (run / "layers.json").is_file():
        return
    before = read_json_object(run / "layers.json").get("calibration", calibration)
    if before != calibration:
        raise IncompatibleInputError(
            f"{run} was begun with other calibration data (digest {before}, now {calibration}). "
            "Have calibration() give the same ones each time (a generator with a seed of its "
            "own), or start a new run."
        )
    known, now = ({layer.name for layer in some} for some in (read_layers(run), layers))
    if known != now:
        raise IncompatibleInputError(
            f"{run} was begun with other layers to search ({min(known ^ now)} differs): the "
            "model, its calibration data or blast-search has changed since. Start a new run."
        )
