"""The whole job: profile, score, search, verify, apply, retrain, report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blast_search.batches import reference_outputs
from blast_search.calibrate import collect_grams
from blast_search.describe import write_front
from blast_search.engine import Engine
from blast_search.errors import IncompatibleInputError
from blast_search.evaluate import Task, evaluate, workloads_of
from blast_search.files import locked, write_json, write_rows
from blast_search.finish import Finish
from blast_search.fitting import Fitter
from blast_search.latency import cells_for, environment, fingerprint, missing_cells
from blast_search.latency_model import LatencyModel
from blast_search.layers import Workload, inventory
from blast_search.plan import FrontPoint, Plan, pareto
from blast_search.progress import SILENT, Reporter
from blast_search.report import write_report
from blast_search.runfolder import RunFolder, start_folder
from blast_search.sensitivity import ProbeTable, estimate_scores
from blast_search.settings import DTYPES, Settings, pick_device
from blast_search.space import LayerSpec, SearchSpace, load_space
from blast_search.tables import Cell, LatencyTable, Measurement, ScoreTable
from blast_search.workers import measure_cells, resolve


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the winning plan, the built (and retrained) model."""

    folder: Path
    plan: Plan
    front: list[FrontPoint]
    model: nn.Module


@dataclass
class Prepared:
    """A task's dense model on its device, with what is known before anything is measured."""

    task: Task
    model: nn.Module
    layers: list[LayerSpec]
    skipped: dict[str, str]
    space: SearchSpace
    workloads: list[Workload]
    device: torch.device
    dtype: torch.dtype
    environment: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.environment)

    def cells(self) -> list[Cell]:
        return cells_for(self.layers, self.space, self.fingerprint, self.dtype, self.device.type)


def prepare(task: Task, settings: Settings, space: SearchSpace) -> Prepared:
    """Build the dense model and list its layers.

    Raises:
        IncompatibleInputError: no linear layer to search, block counts that fit none, a model
            that cannot be called with its workload.
    """
    torch.manual_seed(settings.seed)
    device, dtype = pick_device(settings.device), DTYPES[settings.dtype]
    workloads = workloads_of(task, settings.workload)
    model = task.model().eval().to(device, dtype)
    layers, skipped = inventory(model, workloads, space)
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:4])
        raise IncompatibleInputError(
            f"task {task.name}: no Linear layer to search in {type(model).__name__} "
            f"({reasons or 'it has none'}). Check include, exclude and output_head of the space."
        )
    space.check(layers)
    env = environment(device) | {"dtype": settings.dtype}
    return Prepared(task, model, layers, skipped, space, workloads, device, dtype, env)


def run_profile(
    prepared: Prepared, table: LatencyTable, workers: str, address: str | None, report: Reporter
) -> None:
    """Measure every cell that is not on file yet."""
    missing = missing_cells(table, prepared.cells())
    with report.stage(f"profile cells ({resolve(workers)})", len(missing)) as advance:

        def record(cell: Cell, measured: Measurement | None, status: str) -> None:
            table.add(cell, measured, status)
            advance()

        measure_cells(missing, prepared.device.type, record, workers, address)
    failed = sum(value is None for value in table.cells.values())
    if failed:
        report.say(f"{failed} cells could not be measured; their candidates are left out.")
    dense = [c for c in prepared.cells() if c.candidate.is_dense and table.cells.get(c) is None]
    if dense:
        raise IncompatibleInputError(
            f"the dense layer {dense[0].out_features} x {dense[0].in_features} with "
            f"{dense[0].tokens} tokens could not be timed: see the status column of latency.csv."
        )


def search(
    task: Task | str,
    budget: float | None = None,
    max_drop: float | None = None,
    space: SearchSpace | str | Path | None = None,
    workers: str = "auto",
    *,
    budget_scope: str = "layers",
    workload: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    ray_address: str | None = None,
    storage: str | None = None,
    trials: int = 20,
    time_limit: float | None = None,
    retrain_steps: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    report: Reporter = SILENT,
) -> Run:
    """Search, build, retrain and verify the plan that meets the budgets (README, "Commands").

    Args:
        task: a Task, a built-in task's name, or "pkg.module:function".
        budget: share of the dense cost that may be left; see `budget_scope`.
        max_drop: how far the metric may fall after retraining, in its own unit.
        out: the run folder; default results/<task>-<date>.
        resume: continue the run in `out`; nothing that was measured is measured again.

    Returns:
        The finished run.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets; the nearest one is in plan.json.
        UsageError, IncompatibleInputError, RunLockedError: see blast_search.errors.
    """
    space_name = space.name if isinstance(space, SearchSpace) else str(space or "default")
    settings = Settings(
        task if isinstance(task, str) else task.name, budget, budget_scope, max_drop, space_name,
        workload, device, dtype, storage, trials, time_limit, retrain_steps, seed,
    )  # fmt: skip
    settings.check()
    with opened(settings, task, space, out, resume, workers, ray_address, report) as pipeline:
        return pipeline.run()


@contextmanager
def opened(
    settings: Settings,
    task: Task | str,
    space: SearchSpace | str | Path | None,
    out: str | Path | None,
    resume: bool,
    workers: str,
    ray_address: str | None,
    report: Reporter,
) -> Iterator[Pipeline]:
    """A pipeline in its locked run folder, new or resumed; nothing is written for bad input."""
    from blast_search.tasks import load_task

    resolve(workers)
    loaded = load_task(task) if isinstance(task, str) else task
    chosen = space if isinstance(space, SearchSpace) else load_space(settings.space)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path(out) if out else Path("results") / f"{loaded.name}-{stamp}"
    if not resume:
        prepared = prepare(loaded, settings, chosen)
    stored = start_folder(folder, resume, asdict(settings))
    with locked(folder):
        if resume:
            settings = type(settings)(**stored)
            settings.check()
            prepared = prepare(loaded, settings, chosen)
        yield Pipeline(folder, settings, prepared, workers, ray_address, report)


class Pipeline:
    """The stages of one run, in order; each leaves its file in the run folder."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        prepared: Prepared,
        workers: str,
        ray_address: str | None,
        report: Reporter,
    ) -> None:
        self.folder, self.settings, self.prepared = folder, settings, prepared
        self.workers, self.ray_address, self.report = workers, ray_address, report
        self.records = RunFolder.open(folder)
        self.seconds: dict[str, float] = {}
        self.started = time.monotonic()
        self.dense_metric = float("nan")

    def _timed(self, stage: str, since: float) -> None:
        self.seconds[stage] = round(time.monotonic() - since, 1)

    def search_expired(self) -> bool:
        """Whether the search has used its half of --time-limit."""
        limit = self.settings.time_limit
        return limit is not None and time.monotonic() - self.started > 30 * limit

    def run(self) -> Run:
        plan, points, model, error = Finish(self, self.measured()).run()
        write_front(self.folder, points)
        write_report(self.folder)
        if error:
            raise error
        return Run(self.folder, plan, pareto(points), model)

    def measured(self) -> Engine:
        """Everything that is measured before the search: cells, probes, the dense metric."""
        p, say = self.prepared, self.report.say
        write_json(
            self.folder / "layers.json",
            {"layers": [asdict(layer) for layer in p.layers], "skipped": p.skipped},
        )
        write_json(self.folder / "environment.json", p.environment)
        say(
            f"{p.task.name}: {len(p.layers)} Linear layers to search, {len(p.skipped)} left "
            f"alone, on {p.environment['device']} ({p.environment['dtype']})"
        )
        since = time.monotonic()
        table = LatencyTable.open(self.folder / "latency.csv", p.fingerprint)
        run_profile(p, table, self.workers, self.ray_address, self.report)
        self._timed("profile", since)
        since = time.monotonic()
        engine = self.scored(table)
        self._timed("score", since)
        self.dense_metric = float(
            self.records.once("metric", "dense", "dense", lambda: evaluate(p.task, p.model))
        )
        say(f"dense model: {p.task.metric[0]} {self.dense_metric:.4f}")
        return engine

    def scored(self, table: LatencyTable) -> Engine:
        """Calibrate, probe and score: everything that the solver needs."""
        p = self.prepared
        batches = list(p.task.calibration())
        with self.report.stage("calibrate", 2) as advance:
            references = reference_outputs(p.model, batches)
            advance()
            grams = collect_grams(p.model, p.layers, batches)
            advance()
        ranks = {
            ly.name: max((c.rank for c in p.space.candidates(ly)), default=0) for ly in p.layers
        }
        fitter = Fitter(p.model, p.layers, grams, ranks)
        probes = ProbeTable.open(self.folder / "probes.csv")
        scorer = estimate_scores(
            p.model, p.layers, p.space, table, fitter, batches, references, probes, self.report
        )
        scores = scorer.table(p.layers)
        write_rows(self.folder / "scores.csv", ScoreTable.FIELDS, scores.rows())
        return Engine(
            p.model, p.layers, p.space, p.workloads, batches, references,
            LatencyModel(p.layers, table), fitter, scorer, scores, self.records, self.report,
            self.settings.budget_scope,
        )  # fmt: skip
