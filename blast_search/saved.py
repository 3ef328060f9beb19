"""The verbs that work on a plan or a saved model: apply, refresh, retrain, verify."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from blast_search import apply as apply_plan
from blast_search import load, save
from blast_search.apply import duplicate
from blast_search.batches import move_model, seeded
from blast_search.calibrate import as_batches
from blast_search.distributed import Team, joined
from blast_search.errors import IncompatibleInputError, UsageError, in_one_line
from blast_search.evaluate import (
    Task,
    count_macs,
    count_params,
    evaluate,
    size_ratios,
    workloads_of,
    worse_by,
)
from blast_search.latency import describe
from blast_search.layers import inventory
from blast_search.model_latency import Timing, time_variants
from blast_search.modelfolder import WEIGHTS, leaving
from blast_search.plan import Plan
from blast_search.prepared import dense_model
from blast_search.progress import Reporter, console
from blast_search.recovery import recover
from blast_search.refresh import refresh as refresh_model
from blast_search.report import SCOPES, budget_text
from blast_search.settings import DTYPES, check_seed, pick_device
from blast_search.space import SearchSpace
from blast_search.tasks import exit_text, load_task, names_no_task, refuse_path


def _task_of(plan: Plan, task: str | None) -> Task:
    spec = task or plan.task
    if not spec:
        raise UsageError("the plan names no task: give one with --task.")
    if not task and names_no_task(spec):
        raise UsageError(
            f"this plan's task {spec!r} was a Python object, which no command can find by that "
            "name. Give --task pkg.module:function, a function that returns it."
        )
    return load_task(spec)


def _saved_plan(folder: Path) -> Plan:
    """The plan of a saved model; the folder of a run is refused where its model's is meant."""
    if not (folder / WEIGHTS).is_file() and (folder / "model" / WEIGHTS).is_file():
        raise UsageError(
            f"{folder} is the folder of a run, expected one of a saved model; the run's own "
            f"model is in {folder / 'model'}. Name that."
        )
    return Plan.load(folder)


def _factory(spec: str) -> Callable[[], nn.Module]:
    """A function pkg.module:function that returns the dense model."""
    refuse_path("--model", spec)
    module, _, name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
    except SystemExit as left:
        raise UsageError(f"--model {spec}: the module {exit_text(left)}") from left
    except Exception as error:  # also what the module itself raises
        raise UsageError(
            f"--model {spec}: {type(error).__name__}: {error}. Expected pkg.module:function."
        ) from error
    if not callable(function):
        raise UsageError(f"--model {spec} is not a function that returns the dense model.")

    def build() -> nn.Module:
        try:
            dense: Any = function()
        except Exception as error:
            raise UsageError(
                f"--model {spec} failed: {in_one_line(error)}. Expected a function without "
                "arguments that returns the dense model."
            ) from error
        if not isinstance(dense, nn.Module):
            raise UsageError(f"--model {spec} returned {type(dense).__name__}, expected a Module.")
        return dense

    return build


def apply(
    plan_path: Path, out: Path, task: str | None, model: str | None, report: Reporter
) -> dict[str, Any]:
    """Build the compressed model of a plan; the task's calibration data shape its factors."""
    plan = Plan.load(plan_path)
    with leaving(out):
        factory, calibration = _dense(plan, task, model, report)
        # What was measured of the plan's own model (perhaps retrained) is not true of this one.
        built = apply_plan(factory(), replace(plan, measured={}, baselines={}), calibration)
        save(built, out)
    report.say(f"{out}: {sum(not c.is_dense for c in plan.choices.values())} layers replaced")
    return {"folder": str(out), "layers": {n: c.key for n, c in plan.choices.items()}}


def refresh(
    folder: Path, task: str | None, model: str | None, out: Path | None, report: Reporter
) -> dict[str, Any]:
    """The plan of a saved model on an updated dense checkpoint, from the old factors."""
    plan = _saved_plan(folder)
    with leaving(out or folder, folder):
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
        return _fresh(lambda: dense_model(loaded), plan), _calibration(loaded)
    if task is None:
        report.say("no --task: factors without calibration data, which costs quality.")
    factory = _fresh(_factory(model), plan)
    return factory, _calibration(load_task(task)) if task else None


def _calibration(task: Task) -> list[Any]:
    with seeded():  # the same plan gives the same model
        return as_batches(task.calibration())


def _fresh(factory: Callable[[], nn.Module], plan: Plan) -> Callable[[], nn.Module]:
    """A factory whose models are new ones even if the given one returns the same each time; on
    the GPU where there is one, in the dtype that the plan was searched and measured in."""
    device, dtype = pick_device("auto"), _dtype(plan)
    return lambda: move_model(duplicate(factory()), device, dtype)


def _dtype(plan: Plan) -> torch.dtype | None:
    """The plan's dtype; None for one that was never searched (`uniform_plan`)."""
    name = plan.environment.get("dtype")
    if name is None:
        return None
    if name not in DTYPES:
        raise IncompatibleInputError(
            f"the plan's dtype is {name!r}, expected one of {', '.join(DTYPES)}. Update "
            "blast-search, or search again."
        )
    return DTYPES[name]


def retrain(
    folder: Path,
    task: str | None,
    steps: int | None,
    out: Path | None,
    seed: int,
    report: Reporter,
) -> dict[str, Any]:
    """Train an applied model against its dense original; save it if it is not worse for that.

    Where it is worse, also at a lower rate, `folder` stays as it is; another `out` gets the model
    as it was.  Under torchrun, its processes train together, and the first one saves.

    Raises:
        IncompatibleInputError: the last try failed (no batches, a loss that is not finite).
    """
    check_seed(seed)
    plan = _saved_plan(folder)
    with joined() as team:
        report = report if team.first else Reporter(0, report.check)
        with leaving(out or folder, folder) if team.first else nullcontext():
            loaded = _task_of(plan, task)
            return _retrained(folder, plan, loaded, steps, out or folder, seed, report, team)


def _retrained(
    folder: Path, plan: Plan, loaded: Task, steps: int | None, target: Path, seed: int,
    report: Reporter, team: Team,
) -> dict[str, Any]:  # fmt: skip
    factory = _fresh(lambda: dense_model(loaded), plan)
    before = team.told(lambda: evaluate(loaded, load(folder, factory)))
    found = recover(
        loaded, lambda: load(folder, factory), factory(), before, steps, seed, report=report,
        team=team,
    )  # fmt: skip
    if found.error:
        raise found.error
    kept, name = found.model is not None, loaded.metric[0]
    result = {
        "folder": str(target), "steps": found.steps, "processes": team.size,
        "metric": {"name": name, "before": before, "after": found.metric}, "kept": kept,
    }  # fmt: skip
    if not team.first:
        return result
    text = f"{name}: {before:.4g} before, {found.metric:.4g} after {found.steps} steps"
    if found.model is not None:
        if "metric" in plan.measured:
            known = plan.measured["metric"] | {"retrained": found.metric}
            measured = plan.measured | {"metric": known, "met_budget": None}  # see `verify`
            plan = replace(plan, measured=measured)
        save(found.model, target, plan)
        report.say(text)
    else:
        held = f"{folder} is left as it was"
        if target.resolve() != folder.resolve():
            save(load(folder, factory), target, plan)
            held = f"{target} holds the model as it was"
        Reporter().say(f"{text}, which is worse: {held}.")  # no progress: said with -q, too
    return result


def verify(
    folder: Path, task: str | None, seconds: float, report: Reporter, silent: bool
) -> dict[str, Any]:
    """Quality, latency, parameters and MACs of a saved model against dense."""
    if not 0 < seconds < math.inf:
        raise UsageError(f"seconds are {seconds:g}, expected a number above 0.")
    plan = _saved_plan(folder)
    loaded = _task_of(plan, task)
    # As the plan was measured: on its kind of device, in its dtype, called in its mode.
    env = plan.environment
    kind = str(env.get("device_type", "auto"))
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"{folder} was measured on a CUDA device, and PyTorch sees none here. Verify it "
            "there, or search again on this device."
        )
    device = pick_device(kind)
    dtype = _dtype(plan) or torch.float32
    factory = _fresh(lambda: dense_model(loaded), plan)
    model, dense = (move_model(m, device, dtype) for m in (load(folder, factory), factory()))
    for module in (model, dense):
        module.eval()
    workloads = workloads_of(loaded, plan.search.get("workload") or None)
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
    drop = worse_by(loaded, values["compressed"], values["dense"])
    result: dict[str, Any] = {
        "metric": {"name": loaded.metric[0]} | values,
        "timing": asdict(timing),
        "latency_ratio_layers": timing.ratio_layers,
        "latency_ratio_model": timing.ratio_model,
        "macs_ratio": macs,
        "params_ratio": params,
        "environment": describe(device.type, str(env.get("dtype", "float32"))),
    }
    result["budget"] = judged(plan.budget, result, timing, drop)
    if not silent:
        # Text: names may hold what rich takes for markup.
        view = Table(title=Text(f"{folder}: measured, interleaved, {timing.runs} rounds"))
        for column in ("", loaded.metric[0], "layers", "model", "MACs", "parameters"):
            view.add_column(Text(column))
        view.add_row("dense", f"{values['dense']:.4g}", *["1.000"] * 4)
        ratios = (timing.ratio_layers, timing.ratio_model, macs, params)
        view.add_row("plan", f"{values['compressed']:.4g}", *(f"{r:.3f}" for r in ratios))
        console().print(view)
        words = {True: "met", False: "missed", None: "nothing to judge"}
        text = f"{budget_text(plan.budget)}: {words[result['budget']['met']]} by this measurement."
        console().print(text, markup=False)
    return result


def judged(
    budget: Mapping[str, Any], ratios: Mapping[str, Any], timing: Timing, drop: float
) -> dict[str, Any]:
    """A plan's budget, and whether a measurement meets it ("met"; None: it has none).

    Args:
        ratios: measured, by the names of plan.json.
        drop: of the metric, in its own unit.
    """
    scope, value, allowed = (budget.get(key) for key in ("scope", "value", "max_drop"))
    scope, met = str(scope or "layers"), []
    if value is not None:
        ratio = ratios[SCOPES[scope][2]] if scope in SCOPES else float("nan")
        if budget.get("every_workload"):
            ratio = timing.worst
        met.append(ratio <= value * (1 + 1e-9))
    if allowed is not None:
        met.append(drop <= allowed)
    asked = {"value": value, "scope": scope, "max_drop": allowed}
    return asked | {"met": all(met) if met else None}
