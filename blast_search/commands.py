"""What the verbs of the command line do, with plain arguments and JSON results."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from blast_search import apply as apply_plan
from blast_search import load, pipeline, solver
from blast_search.errors import IncompatibleInputError, InfeasibleBudgetError, UsageError
from blast_search.evaluate import (
    Task,
    count_macs,
    count_params,
    evaluate,
    size_ratios,
    workloads_of,
)
from blast_search.files import (
    locked,
    make_folder,
    read_json,
    read_rows,
    read_yaml_mapping,
    write_json,
)
from blast_search.latency import CELL_SECONDS, environment, fingerprint, interleave, time_variants
from blast_search.layers import inventory
from blast_search.plan import FrontPoint, LayerPlan, Plan
from blast_search.progress import Reporter
from blast_search.retrain import retrain as retrain_model
from blast_search.settings import Settings
from blast_search.space import Call, LayerSpec, load_space
from blast_search.tables import LatencyTable, ScoreTable, layer_options
from blast_search.tasks import load_task

NOT_SETTINGS = (
    "workers", "ray_address", "out", "resume", "dry_run", "config", "as_json", "quiet", "verbose",
)  # fmt: skip
SETTING_NAMES = {f.name for f in fields(Settings)}


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 110)


def search(
    options: Mapping[str, Any],
    given: Mapping[str, Any],
    config: Path | None,
    resume: Path | None,
    dry_run: bool,
    report: Reporter,
    silent: bool,
) -> dict[str, Any]:
    """The whole pipeline.  Flags override --config; --resume keeps the run's own."""
    values = dict(options) | {"workers": "auto", "ray_address": None, "out": None}
    values |= {k: given[k] for k in ("workers", "ray_address", "out") if k in given}
    if config:
        values |= _config(config)
    values |= {k: v for k, v in given.items() if k in values}
    if resume:
        file = resume / "config.yaml"
        if not file.is_file():
            raise UsageError(f"{resume} holds no run to resume (no config.yaml). Check the path.")
        stored = read_yaml_mapping(file)
        if odd := set(stored) ^ SETTING_NAMES:
            raise IncompatibleInputError(f"{file}: missing or unknown keys {sorted(odd)}.")
        changed = [k for k in stored if k in given and given[k] != stored[k]]
        if changed:
            raise UsageError(
                f"--resume continues {resume} as it was started; {', '.join(changed)} "
                "cannot change. Leave the options out, or start a new run."
            )
        values |= stored | {"out": resume}
    if dry_run:
        return forecast(values, report, silent)
    run = pipeline.search(**values, resume=resume is not None, report=report)
    if not silent:
        from blast_search.report import result_table, verdict

        _console().print(result_table(run.plan))
        notice = verdict(run.plan)
        _console().print(f"{notice.title} {notice.text}", markup=False)
        _console().print(run.plan.search["verdict"], markup=False)
        _console().print(f"{run.folder / 'report.html'}", markup=False)
    return {"run": str(run.folder), "plan": run.plan.to_json()}


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"config file {path} does not exist. Check the path.")
    values = {key.replace("-", "_"): value for key, value in read_yaml_mapping(path).items()}
    known = SETTING_NAMES | {"workers", "ray_address", "out"}
    if unknown := sorted(set(values) - known):
        raise IncompatibleInputError(
            f"{path}: unknown key {', '.join(unknown)}, expected {', '.join(sorted(known))}."
        )
    kinds = {"budget": float, "max_drop": float, "time_limit": float, "seed": int, "trials": int}
    for key, kind in kinds.items():
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind | int)):
            raise IncompatibleInputError(f"{path}: {key} is {value!r}, expected a number.")
    return values


def forecast(values: Mapping[str, Any], report: Reporter, silent: bool) -> dict[str, Any]:
    """What a search would measure, what is on file, and about how long the rest takes."""
    settings = Settings(**{k: values[k] for k in SETTING_NAMES})
    settings.check()
    task, space = load_task(settings.task), load_space(settings.space)
    prepared = pipeline.prepare(task, settings, space)
    cells = prepared.cells()
    known = 0
    out = values.get("out")
    if out and (Path(out) / "latency.csv").is_file():
        table = LatencyTable.open(Path(out) / "latency.csv", prepared.fingerprint)
        known = sum(cell in table.cells for cell in cells)
    naive = sum(len(space.candidates(ly)) * len(ly.calls) for ly in prepared.layers)
    result = {
        "layers": len(prepared.layers),
        "cells": len(cells),
        "cells_without_sharing": naive,
        "cells_on_file": known,
        "probes": len(prepared.layers),
        "trials": settings.trials,
        # Timing itself; calibration, probes, trials and retraining depend on the task's data.
        "predicted_profile_minutes": round((len(cells) - known) * (CELL_SECONDS + 0.15) / 60, 1),
    }
    if not silent:
        for key, value in result.items():
            _console().print(f"{key.replace('_', ' '):<28} {value}", markup=False)
    return result


def profile(
    task: str, space: str, workload: str | None, device: str, dtype: str, workers: str,
    ray_address: str | None, out: Path | None, seed: int, dry_run: bool, report: Reporter,
    silent: bool,
) -> dict[str, Any]:  # fmt: skip
    """The latency table of a task's model: layers.json, environment.json and latency.csv."""
    settings = Settings(
        task=task,
        budget=1.0,
        space=space,
        workload=workload,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    settings.check()
    if dry_run:
        return forecast(asdict(settings) | {"out": out}, report, silent)
    loaded = load_task(task)
    prepared = pipeline.prepare(loaded, settings, load_space(space))
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = make_folder(out or Path("results") / f"profile-{loaded.name}-{stamp}")
    with locked(folder):
        write_json(folder / "environment.json", prepared.environment)
        layers = [asdict(layer) for layer in prepared.layers]
        write_json(folder / "layers.json", {"layers": layers, "skipped": prepared.skipped})
        table = LatencyTable.open(folder / "latency.csv", prepared.fingerprint)
        pipeline.run_profile(prepared, table, workers, ray_address, report)
    if not silent:
        _console().print(_latency_table(prepared.layers, table))
        _console().print(f"{folder / 'latency.csv'}", markup=False)
    return {"folder": str(folder), "cells": len(table.cells), "environment": prepared.environment}


def _latency_table(layers: list[LayerSpec], table: LatencyTable) -> Table:
    """Per layer shape, the candidates' measured ratio to dense."""
    view = Table(title="measured latency ratio to dense")
    for column in ("layer shape", "layers", "dense us", "candidates, fastest first"):
        view.add_column(column)
    shapes: dict[tuple[Any, ...], list[LayerSpec]] = {}
    for layer in layers:
        shapes.setdefault((layer.shape, layer.bias, layer.calls), []).append(layer)
    for members in shapes.values():
        costs = table.costs(members[0])
        dense = next(cost for c, cost in costs.items() if c.is_dense)
        ranked = sorted((cost / dense, c.key) for c, cost in costs.items() if not c.is_dense)
        m, n = members[0].shape
        text = "  ".join(f"{key} {ratio:.2f}" for ratio, key in ranked)
        view.add_row(f"{m} x {n}", str(len(members)), f"{dense:.0f}", text)
    return view


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
            _console().print(
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
        for column in ("plan", "predicted layer ratio", "predicted loss", "measured loss"):
            view.add_column(column)
        for row in sorted(rows, key=lambda r: float(r["predicted_layer_latency_ratio"] or 1)):
            name = row["name"] + (" *" if row["on_front"] == "1" else "")
            values = (row[FrontPoint.FIELDS[1]], row[FrontPoint.FIELDS[3]], row["measured_loss"])
            view.add_row(name, *(f"{float(v):.4f}" if v else "-" for v in values))
        _console().print(view)
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
    correction = float(base.search.get("correction") or 1.0)
    try:
        solution = solver.solve(options, ratio / correction * dense_us)
    except InfeasibleBudgetError:
        smallest = solver.cheapest(options) / dense_us * correction
        raise InfeasibleBudgetError(
            f"no plan has a predicted layer ratio of {ratio:g}; the smallest is {smallest:.3f}."
        ) from None
    reached = solution.cost_us / dense_us * correction
    dense_ms = base.measured["dense_latency_ms"]
    fixed_ms = base.measured["fixed_latency_ms"]
    return replace(
        base,
        layers={ly.name: LayerPlan.of(ly, solution.choices[ly.name]) for ly in layers},
        budget={"value": ratio, "scope": "layers", "max_drop": None},
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
    return function  # type: ignore[no-any-return]


def apply(
    plan_path: Path, out: Path, task: str | None, model: str | None, report: Reporter
) -> dict[str, Any]:
    """Build the compressed model of a plan; the task's calibration data shape its factors."""
    from blast_search import save

    plan = Plan.load(plan_path)
    make_folder(out)
    if model:
        dense = _factory(model)()
        calibration = list(load_task(task).calibration()) if task else None
        if calibration is None:
            report.say("no --task: factors without calibration data, which costs quality.")
    else:
        loaded = _task_of(plan, task)
        dense, calibration = loaded.model(), list(loaded.calibration())
    if not isinstance(dense, nn.Module):
        raise UsageError(f"--model {model} returned {type(dense).__name__}, expected a Module.")
    built = apply_plan(dense, plan, calibration)
    save(built, out)
    report.say(f"{out}: {sum(not c.is_dense for c in plan.choices.values())} layers replaced")
    return {"folder": str(out), "layers": {n: c.key for n, c in plan.choices.items()}}


def retrain(
    folder: Path,
    task: str | None,
    steps: int | None,
    out: Path | None,
    seed: int,
    report: Reporter,
) -> dict[str, Any]:
    """Train an applied model against its dense original and save it."""
    from blast_search import save

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
    model, dense = load(folder, loaded.model), loaded.model()
    workloads = workloads_of(loaded)
    everything = load_space("default")
    layers = [
        layer
        for layer in inventory(dense, workloads, replace(everything, output_head=True))[0]
        if layer.name in plan.layers
    ]
    replaced = {n: model.get_submodule(n) for n, c in plan.choices.items() if not c.is_dense}
    timing = time_variants(dense, layers, {"plan": replaced}, workloads, seconds)["plan"]
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
        "environment": environment(torch.device("cpu")),
    }
    if not silent:
        view = Table(title=f"{folder}: measured, interleaved, {timing.runs} rounds")
        for column in ("", loaded.metric[0], "layers", "model", "MACs", "parameters"):
            view.add_column(column)
        view.add_row("dense", f"{values['dense']:.4f}", *["1.000"] * 4)
        ratios = (timing.ratio_layers, timing.ratio_model, macs, params)
        view.add_row("plan", f"{values['compressed']:.4f}", *(f"{r:.3f}" for r in ratios))
        _console().print(view)
    return result


def doctor(silent: bool) -> dict[str, Any]:
    """What this machine is, what is installed, and how steady its clock is."""
    from importlib import metadata

    from blast_search.kernels import choose

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {}
    for name in ("torch", "ray", "optuna", "numba", "triton", "transformers", "scipy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    layer = nn.Linear(768, 768, device=device)
    x = torch.randn(256, 768, device=device)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with torch.inference_mode():
        times = interleave({"a": lambda: layer(x), "b": lambda: layer(x)}, sync, 1.0)
    p10, p50, p90 = (float(v) for v in torch.tensor(times["a"]).quantile(
        torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)))  # fmt: skip
    twin = float(torch.tensor(times["a"] / times["b"]).median())
    result = {
        "environment": environment(device),
        "versions": versions,
        "kernels": {f"b={b}": choose(b, torch.float32, device.type) for b in (1, 2, 8)},
        "noise": {
            "what": "Linear 768 x 768, 256 tokens, against itself",
            "median_us": p50, "p10_us": p10, "p90_us": p90,
            "spread": (p90 - p10) / p50, "twin_ratio": twin,
        },
    }  # fmt: skip
    if not silent:
        _console().print(yaml.safe_dump(result, sort_keys=False), markup=False)
        if result["noise"]["spread"] > 0.3:  # type: ignore[index]
            _console().print("The timing is noisy: stop other programs before you measure.")
    return result
