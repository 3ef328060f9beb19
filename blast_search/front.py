"""The verb `pareto`: the front of a run, and plans for other budgets from what is on file."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from blast_search import solver
from blast_search.engine import corrected
from blast_search.errors import IncompatibleInputError, InfeasibleBudgetError, UsageError
from blast_search.figures import read_front
from blast_search.files import make_folder, read_json, read_rows
from blast_search.latency import fingerprint
from blast_search.latency_model import LatencyModel
from blast_search.plan import FrontPoint, LayerPlan, Plan
from blast_search.progress import console
from blast_search.space import Call, LayerSpec, ties_of
from blast_search.tables import LatencyTable, ScoreTable, layer_options


def existing_run(run: Path) -> Path:
    if not run.is_dir():
        raise UsageError(f"{run} is no run folder. Check the path (results/<run>).")
    return run


def pareto(
    run: Path, at: float | None, out: Path | None, plot: Path | None, form: str
) -> dict[str, Any]:
    """The front of a run; with `at`, a plan for another budget from the tables on file."""
    existing_run(run)
    result: dict[str, Any] = {}
    if at is not None:
        if not 0 < at <= 1:
            raise UsageError(f"--at is {at:g}, expected a ratio above 0 and up to 1.")
        plan = plan_at(run, at)
        path = out or make_folder(run / "plans") / f"at-{at:g}.json"
        plan.save(path)
        result |= {"plan": str(path), "predicted": plan.predicted}
        if form == "table":
            ratio = plan.predicted["latency_ratio_layers"]
            console().print(
                f"{path}: predicted layer latency ratio {ratio:.3f} (not measured yet: "
                "`blast-search apply` and `verify` it)",
                markup=False,
            )
    if not (run / "front.csv").is_file():
        raise IncompatibleInputError(
            f"{run} has no front.csv: the run is not finished. Continue it with --resume {run}."
        )
    rows = read_rows(run / "front.csv", FrontPoint.FIELDS)
    read_front(run / "front.csv")  # refuses what is no number
    if plot:
        if not (run / "front.png").is_file():
            from blast_search.report import write_report

            write_report(run)
        plot.write_bytes((run / "front.png").read_bytes())
    if form == "csv":
        writer = csv.DictWriter(sys.stdout, FrontPoint.FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif form == "table" and at is None:
        view = Table(title="evaluated plans (* on the front)")
        for column in ("plan", "layer latency ratio", "predicted loss", "measured loss"):
            view.add_column(column)
        known = [
            (float(row[FrontPoint.FIELDS[1]] or row[FrontPoint.FIELDS[2]]), row) for row in rows
        ]
        for ratio, row in sorted(known, key=lambda item: item[0]):
            how = "measured" if row[FrontPoint.FIELDS[2]] else "predicted"
            view.add_row(
                row["name"] + (" *" if row["on_front"] == "1" else ""), f"{ratio:.4f} {how}",
                *(f"{float(row[key]):.4f}" for key in (FrontPoint.FIELDS[3], "measured_loss")),
            )  # fmt: skip
        console().print(view)
    return result | {"front": rows}


def plan_at(run: Path, ratio: float) -> Plan:
    """The exact plan for another layer ratio, from latency.csv, scores.csv and plan.json."""
    base = Plan.load(run / "plan.json")
    layers = read_layers(run)
    env = read_json(run / "environment.json")
    if lost := [n for n in ("latency.csv", "scores.csv") if not (run / n).is_file()]:
        raise IncompatibleInputError(
            f"{run} has no {' and no '.join(lost)}. Restore the folder, or search again."
        )
    table = LatencyTable.open(run / "latency.csv", fingerprint(env))
    try:
        options = layer_options(layers, table, ScoreTable.read(run / "scores.csv"))
    except KeyError:
        raise IncompatibleInputError(
            f"{run / 'latency.csv'} has no cells for some layers of layers.json. Restore it, "
            f"or measure them again with --resume {run}."
        ) from None
    dense_us = sum(
        max(o.cost_us for o in opts if o.candidate.is_dense) for opts in options.values()
    )
    factors = {int(b): float(f) for b, f in (base.search.get("factors") or {}).items()}
    every = base.budget.get("every_workload") or []
    latency = LatencyModel(
        layers, table, float(base.search.get("correction") or 1.0), factors, every
    )
    options = corrected(options, latency.factor)

    def solved(at: float) -> solver.Solution:
        return solver.solve(
            options, at * dense_us, ties=ties_of(layers), limits=latency.limits(at)
        )

    try:
        solution = solved(ratio)
    except InfeasibleBudgetError:
        smallest, _ = solver.least(solved)
        raise InfeasibleBudgetError(
            f"no plan has a predicted layer ratio of {ratio:g}; the smallest is {smallest:.3f}."
        ) from None
    reached = solution.cost_us / dense_us
    dense_ms = base.measured["dense_latency_ms"]
    fixed_ms = base.measured["fixed_latency_ms"]
    return replace(
        base,
        layers={ly.name: LayerPlan.of(ly, solution.choices[ly.name]) for ly in layers},
        budget={"value": ratio, "scope": "layers", "max_drop": None}
        | ({"every_workload": every} if every else {}),
        predicted={
            "latency_ms": fixed_ms + reached * (dense_ms - fixed_ms),
            "latency_ratio_layers": reached,
            "score_increase": solution.loss,
        },
        measured={},
        baselines={},
        search={"optimality_gap": solution.gap}
        | {key: base.search.get(key) for key in ("solver", "trials", "seed", "workload")},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        weights_sha256="",
    )


def read_layers(run: Path) -> list[LayerSpec]:
    """layers.json as LayerSpecs."""
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
        raise IncompatibleInputError(f"{path} is damaged ({error}).") from error
