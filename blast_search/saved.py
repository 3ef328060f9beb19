"""The verbs that work on what is on file: a run folder, a plan, a saved model."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from blast_search import apply as apply_plan
from blast_search import load, save, solver
from blast_search.engine import corrected
from blast_search.errors import IncompatibleInputError, InfeasibleBudgetError, UsageError
from blast_search.evaluate import (
    Task,
    count_macs,
    count_params,
    evaluate,
    size_ratios,
    workloads_of,
)
from blast_search.files import make_folder, read_json, read_rows
from blast_search.latency import describe, fingerprint
from blast_search.latency_model import LatencyModel
from blast_search.layers import inventory
from blast_search.model_latency import time_variants
from blast_search.plan import FrontPoint, LayerPlan, Plan
from blast_search.progress import Reporter
from blast_search.refresh import refresh as refresh_model
from blast_search.retrain import retrain as retrain_model
from blast_search.settings import DTYPES, pick_device
from blast_search.space import Call, LayerSpec, SearchSpace, ties_of
from blast_search.tables import LatencyTable, ScoreTable, layer_options
from blast_search.tasks import load_task


def console() -> Console:
    """Tables on stdout: as wide as the terminal, 110 columns where there is none."""
    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 110)


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
    if plot:
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
    table = LatencyTable.open(run / "latency.csv", fingerprint(env))
    options = layer_options(layers, table, ScoreTable.read(run / "scores.csv"))
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
        search={"optimality_gap": solution.gap, "solver": base.search.get("solver", "")},
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


def _task_of(plan: Plan, task: str | None) -> Task:
    spec = task or plan.task
    if not spec:
        raise UsageError("the plan names no task: give one with --task.")
    return load_task(spec)


def _factory(spec: str) -> Callable[[], nn.Module]:
    """A function pkg.module:function that returns the dense model."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--model {spec}: {error}. Expected pkg.module:function.") from error
    if not callable(function):
        raise UsageError(f"--model {spec} is not a function that returns the dense model.")

    def build() -> nn.Module:
        if not isinstance(dense := function(), nn.Module):
            raise UsageError(f"--model {spec} returned {type(dense).__name__}, expected a Module.")
        return dense

    return build


def apply(
    plan_path: Path, out: Path, task: str | None, model: str | None, report: Reporter
) -> dict[str, Any]:
    """Build the compressed model of a plan; the task's calibration data shape its factors."""
    plan = Plan.load(plan_path)
    make_folder(out)
    factory, calibration = _dense(plan, task, model, report)
    built = apply_plan(factory(), plan, calibration)
    save(built, out)
    report.say(f"{out}: {sum(not c.is_dense for c in plan.choices.values())} layers replaced")
    return {"folder": str(out), "layers": {n: c.key for n, c in plan.choices.items()}}


def refresh(
    folder: Path, task: str | None, model: str | None, out: Path | None, report: Reporter
) -> dict[str, Any]:
    """The plan of a saved model on an updated dense checkpoint, from the old factors."""
    plan = Plan.load(folder)
    factory, calibration = _dense(plan, task, model, report)
    built, errors = refresh_model(folder, factory, calibration, report)
    save(built, out or folder)
    before, after = (
        sum(getattr(e, key) for e in errors.values()) / max(len(errors), 1)
        for key in ("before", "after")
    )
    report.say(
        f"{out or folder}: {len(errors)} layers fitted again; mean relative error {before:.4f} "
        f"with the old factors, {after:.4f} now. Not retrained and not measured yet: "
        "`blast-search retrain` and `verify` it."
    )
    values = {name: asdict(e) for name, e in errors.items()}
    return {"folder": str(out or folder), "relative_errors": values}


def _dense(
    plan: Plan, task: str | None, model: str | None, report: Reporter
) -> tuple[Callable[[], nn.Module], list[Any] | None]:
    """What builds the dense model (--model, else the task), and the task's calibration data."""
    if not model:
        loaded = _task_of(plan, task)
        return loaded.model, list(loaded.calibration())
    if task is None:
        report.say("no --task: factors without calibration data, which costs quality.")
    return _factory(model), list(load_task(task).calibration()) if task else None


def retrain(
    folder: Path,
    task: str | None,
    steps: int | None,
    out: Path | None,
    seed: int,
    report: Reporter,
) -> dict[str, Any]:
    """Train an applied model against its dense original and save it."""
    plan = Plan.load(folder)
    loaded = _task_of(plan, task)
    model = load(folder, loaded.model)
    before = evaluate(loaded, model)
    losses = retrain_model(loaded, model, loaded.model(), steps, seed, report=report)
    after = evaluate(loaded, model)
    save(model, out or folder, plan)
    report.say(f"{loaded.metric[0]}: {before:.4f} before, {after:.4f} after {len(losses)} steps")
    metric = {"name": loaded.metric[0], "before": before, "after": after}
    return {"folder": str(out or folder), "steps": len(losses), "metric": metric}


def verify(
    folder: Path, task: str | None, seconds: float, report: Reporter, silent: bool
) -> dict[str, Any]:
    """Quality, latency, parameters and MACs of a saved model against dense."""
    plan = Plan.load(folder)
    loaded = _task_of(plan, task)
    # As the plan was measured: on its kind of device, in its dtype, called in its mode.
    env = plan.environment
    device = pick_device(str(env.get("device_type", "auto")))
    dtype = DTYPES[str(env.get("dtype", "float32"))]
    model = load(folder, loaded.model).eval().to(device, dtype)
    dense = loaded.model().eval().to(device, dtype)
    workloads = workloads_of(loaded)
    everything = SearchSpace(output_head=True)
    layers = [ly for ly in inventory(dense, workloads, everything)[0] if ly.name in plan.layers]
    replaced = {n: model.get_submodule(n) for n, c in plan.choices.items() if not c.is_dense}
    timing = time_variants(
        dense, layers, {"plan": replaced}, workloads, seconds, mode=str(env.get("mode", "eager"))
    )["plan"]
    macs, params = size_ratios(
        layers, plan.choices, count_params(dense), count_macs(dense, workloads)
    )
    values = {"dense": evaluate(loaded, dense), "compressed": evaluate(loaded, model)}
    result = {
        "metric": {"name": loaded.metric[0]} | values,
        "timing": asdict(timing),
        "latency_ratio_layers": timing.ratio_layers,
        "latency_ratio_model": timing.ratio_model,
        "macs_ratio": macs,
        "params_ratio": params,
        "environment": describe(device.type, str(env.get("dtype", "float32"))),
    }
    if not silent:
        view = Table(title=f"{folder}: measured, interleaved, {timing.runs} rounds")
        for column in ("", loaded.metric[0], "layers", "model", "MACs", "parameters"):
            view.add_column(column)
        view.add_row("dense", f"{values['dense']:.4f}", *["1.000"] * 4)
        ratios = (timing.ratio_layers, timing.ratio_model, macs, params)
        view.add_row("plan", f"{values['compressed']:.4f}", *(f"{r:.3f}" for r in ratios))
        console().print(view)
    return result
