"""The verbs that measure: search, profile, doctor; plain arguments in, JSON values out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from torch import nn

from blast_search import pipeline
from blast_search.errors import IncompatibleInputError, InfeasibleBudgetError, UsageError
from blast_search.files import is_run, locked, make_folder, read_yaml_mapping, write_json
from blast_search.forecast import forecast
from blast_search.latency import environment, interleave
from blast_search.latency_model import LatencyModel
from blast_search.noise import gpu_state, table_noise
from blast_search.plan import Plan
from blast_search.plan_check import check_text, cross_validated, measure_plans
from blast_search.prepared import prepare
from blast_search.profiling import Profiler
from blast_search.progress import Reporter, console
from blast_search.replan import read_layers
from blast_search.runfolder import RunFolder, stored_settings, stored_workers
from blast_search.settings import SETTING_NAMES, Settings
from blast_search.space import LayerSpec, load_space
from blast_search.tables import LatencyTable
from blast_search.tasks import SHAPES, load_task, names_no_task
from blast_search.workers import check_workers

NOT_SETTINGS = (
    "workers", "ray_address", "out", "resume", "dry_run", "config", "as_json", "quiet", "verbose",
)  # fmt: skip
FLAGS = ("json", "quiet", "verbose", "dry_run", "resume")  # no keys of a --config file
CHECK_PLANS = 30
NOT_ARGUMENTS = ("resume", "as_json", "quiet", "verbose")


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
    asked = _config(config) if config else {}
    asked |= {k: v for k, v in given.items() if k in values}
    values |= asked
    if resume:
        values |= _stored(resume, Settings, asked) | _place(resume, asked)
    if dry_run:
        check_workers(values["workers"], values["ray_address"])
        return forecast(values, report, silent)
    try:
        with _naming_the_run(report):
            run = pipeline.search(**values, resume=resume is not None, report=report)
    except InfeasibleBudgetError as error:
        if report.run and (report.run / "plan.json").is_file():
            error.nearest = Plan.load(report.run)
            error.result = _result(report.run, error.nearest, silent)
        raise
    return _result(run.folder, run.plan, silent)


def _result(folder: Path, plan: Plan, silent: bool) -> dict[str, Any]:
    """What a finished search says: of its plan, or of the nearest one to a budget out of reach."""
    if not silent:
        from blast_search.report import result_table, verdict

        console().print(result_table(plan))
        notice = verdict(plan)
        console().print(f"{notice.title} {notice.text}", markup=False)
        console().print(plan.search["verdict"], markup=False)
        console().print(f"{folder / 'report.html'}", markup=False)
    return {"run": str(folder), "plan": plan.to_json()}


@contextmanager
def _naming_the_run(report: Reporter) -> Iterator[None]:
    """Errors, and the end by a signal, carry the run folder that is left (cli.py tells it)."""
    try:
        yield
    except BaseException as error:
        error.run = report.run  # type: ignore[attr-defined]
        raise


def _stored(resume: Path, kind: type[Settings], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run to resume; options that are given beside it must agree.

    But for --storage: it may have moved, and its password is not on file.
    """
    stored = asdict(stored_settings(resume, kind))
    if "storage" in asked:
        stored["storage"] = asked["storage"]
    if names_no_task(stored["task"]):  # whether it is the same is seen in `opened`
        if "task" not in asked:
            raise UsageError(
                f"{resume} was started with a Python object, of which its name "
                f"{stored['task']!r} is kept: give --task pkg.module:function beside --resume."
            )
        stored["task"] = asked["task"]
    changed = [k for k in stored if k in asked and asked[k] != stored[k]]
    if asked.get("out") and Path(asked["out"]).resolve() != resume.resolve():
        changed.append("out")
    if changed:
        raise UsageError(
            f"--resume continues {resume} as it was started; {', '.join(changed)} "
            "cannot change. Leave the options out, or start a new run."
        )
    return stored


def _place(resume: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run goes on, and with which workers: as it was started, unless asked otherwise."""
    return {"out": resume, "workers": asked.get("workers") or stored_workers(resume)}


def compare(
    options: Mapping[str, Any],
    given: Mapping[str, Any],
    resume: Path | None,
    report: Reporter,
    silent: bool,
) -> dict[str, Any]:
    """The search beside uniform plans of every structure, at equal measured latency."""
    from blast_search import compare as comparing

    values = dict(options)
    if resume:
        stored = _stored(resume, comparing.CompareSettings, given)
        values |= {k: v for k, v in stored.items() if k in values}
        values |= _place(resume, given)
    if values["budget"] is None:
        raise UsageError("no budget: give --budget, for instance 0.3.")
    with _naming_the_run(report):
        result = comparing.compare(**values, resume=resume is not None, report=report)
    if not silent:
        console().print(result.table())
        for text in result.verdicts:
            console().print(f"The search against {text}", markup=False)
        for text in result.without_plans:
            console().print(text, markup=False)
        console().print(f"{result.folder / 'compare.md'}", markup=False)
    value = {"run": str(result.folder)} | result.to_json()
    if result.missed:
        error = InfeasibleBudgetError(result.missed)
        error.result = value
        raise error
    return value


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"config file {path} does not exist. Check the path.")
    values = {key.replace("-", "_"): value for key, value in read_yaml_mapping(path).items()}
    known = SETTING_NAMES | {"workers", "ray_address", "out"}
    if unknown := sorted(set(values) - known):
        apart = (
            f" {', '.join(FLAGS)} stand on the command line only." if {*unknown} & {*FLAGS} else ""
        )
        raise IncompatibleInputError(
            f"{path}: unknown key {', '.join(unknown)}, expected "
            f"{', '.join(sorted(known))}.{apart}"
        )
    kinds = {"budget": float, "max_drop": float, "time_limit": float, "seed": int, "trials": int}
    for key, kind in kinds.items():
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind | int)):
            raise IncompatibleInputError(f"{path}: {key} is {value!r}, expected a number.")
    for key in ("task", "out", "ray_address"):
        value = values.get(key, "")
        if not isinstance(value, str) and (value is not None or key == "task"):
            raise IncompatibleInputError(f"{path}: {key} is {value!r}, expected text.")
    return values


def profile(
    settings: Settings,
    workers: str,
    ray_address: str | None,
    out: Path | None,
    check: bool,
    dry_run: bool,
    report: Reporter,
    silent: bool,
) -> dict[str, Any]:
    """The latency table of a task's model: layers.json, environment.json and latency.csv.

    With `check`, random plans are built and timed (measured.csv): predicted against measured.
    """
    settings.check()
    check_workers(workers, ray_address)
    if out and is_run(out):
        raise UsageError(
            f"{out} is the folder of a run, which --out would change. Choose another."
        )
    if dry_run:
        return forecast(asdict(settings) | {"out": out}, report, silent)
    loaded = load_task(settings.task)
    meta = settings.task.startswith(SHAPES) and not check
    prepared = prepare(loaded, settings, load_space(settings.space), meta)
    if prepared.note:
        report.say(prepared.note)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = make_folder(out or Path("results") / f"profile-{loaded.name}-{stamp}")
    with locked(folder):
        # First: a folder of another device or model is refused before anything in it is changed.
        table = LatencyTable.open(folder / "latency.csv", prepared.fingerprint, prepared.mode)
        _check_layers(folder, prepared.layers)
        write_json(folder / "environment.json", prepared.environment)
        write_json(folder / "layers.json", prepared.listing())
        Profiler(prepared, table, workers, ray_address, report).run(settings.profile)
        latency = LatencyModel(prepared.layers, table)
        checked = (
            measure_plans(
                prepared.model, latency, prepared.workloads, RunFolder.open(folder), report,
                settings.seed, CHECK_PLANS, settings.mode,
            )
            if check
            else []
        )  # fmt: skip
    noise, errors = table_noise(table.cells), cross_validated(checked)
    if not silent:
        console().print(_latency_table(prepared.layers, table))
        console().print(noise.text, markup=False)
        if errors:
            console().print(check_text(errors), markup=False)
        console().print(f"{folder / 'latency.csv'}", markup=False)
    return {
        "folder": str(folder),
        "cells": len(table.cells),
        "environment": prepared.environment,
        "timing_noise": asdict(noise) | {"noisy": noise.noisy},
        "latency_check": errors,
    }


def _check_layers(folder: Path, layers: list[LayerSpec]) -> None:
    """Refuse a profile of other layers, those of another model or search space."""
    if not (folder / "layers.json").is_file():
        return
    known, mine = ({(ly.name, ly.shape) for ly in some} for some in (read_layers(folder), layers))
    if known != mine:
        raise UsageError(
            f"{folder} is a profile of other layers ({min(known ^ mine)[0]} differs). Choose "
            "another --out; measured cells are shared between folders all the same."
        )


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


def doctor(silent: bool) -> dict[str, Any]:
    """What this machine is, what is installed, and how steady its clock is."""
    from importlib import metadata

    from blast_search.kernels import choose, emulated

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
    halves = (torch.bfloat16, torch.float16) if device.type == "cpu" else ()
    slow = [str(dtype).removeprefix("torch.") for dtype in halves if emulated(dtype)]
    result = {
        "environment": environment(device),
        "versions": versions,
        "slow_dtypes": slow,
        "gpu": gpu_state(),
        "kernels": {
            f"b={b}, {t} tokens": choose(b, 64, torch.float32, device.type, t)
            for b in (1, 4) for t in (1, 512)
        },
        "noise": {
            "what": "Linear 768 x 768, 256 tokens, against itself",
            "median_us": p50, "p10_us": p10, "p90_us": p90,
            "spread": (p90 - p10) / p50, "twin_ratio": twin,
        },
    }  # fmt: skip
    if not silent:
        console().print(yaml.safe_dump(result, sort_keys=False), markup=False)
        if result["noise"]["spread"] > 0.3:  # type: ignore[index]
            console().print("The timing is noisy: stop other programs before you measure.")
        if slow:
            console().print(f"No fast products for {', '.join(slow)} on this CPU: use float32.")
    return result
