"""The whole job: profile, score, search, verify, apply, retrain, report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blast_search.calibrate import collect_grams
from blast_search.deadline import FOREVER, Deadline
from blast_search.describe import write_front
from blast_search.doubtful import doubtful
from blast_search.engine import Engine
from blast_search.errors import UsageError
from blast_search.evaluate import Task, evaluate
from blast_search.files import locked, write_json, write_rows
from blast_search.finish import Finish
from blast_search.fitting import Fitter
from blast_search.judge import Judge
from blast_search.latency_model import LatencyModel
from blast_search.model_latency import STEERED, check_calls
from blast_search.panel import Panel
from blast_search.plan import FrontPoint, Plan, pareto
from blast_search.plan_check import correction, cross_validated, measure_plans
from blast_search.prepared import Prepared, prepare, read_calibration
from blast_search.profiling import Profiler
from blast_search.progress import SILENT, Reporter
from blast_search.replan import check_layers
from blast_search.report import write_report
from blast_search.retrain import tried_loss
from blast_search.runfolder import RunFolder, start_folder, stored_settings
from blast_search.sensitivity import ProbeTable, estimate_scores
from blast_search.settings import Settings
from blast_search.space import SearchSpace, kept_space, load_space, space_values
from blast_search.storage import check_database, without_password
from blast_search.tables import LatencyTable, ScoreTable
from blast_search.workers import check_workers, resolve

# Of the time that is left to the search:
CHECK_SHARE = 0.2  # for timing random plans
SCORE_SHARE = 0.4


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the winning plan, the built (and retrained) model."""

    folder: Path
    plan: Plan
    front: list[FrontPoint]
    model: nn.Module


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
    mode: str = "eager",
    profile: str = "full",
    every_workload: bool = False,
    report: Reporter = SILENT,
) -> Run:
    """Search, build, retrain and verify the plan that meets the budgets.

    Args:
        task: a Task, a built-in task's name, or "pkg.module:function".
        budget: share of the dense cost that may be left; see `budget_scope`.
        max_drop: how far the metric may fall after retraining, in its own unit.
        out: the run folder; default results/<task>-<date>.
        resume: continue the run in `out`; nothing that was measured is measured again.
        mode: how calls are timed (modes.py): "eager", "compiled", "cuda-graph".
        profile: "full" measures every candidate's cells, "pruned" those that could be chosen.
        every_workload: the budget holds on each workload, not only on their weighted sum.
        report: told what is being done; by default nothing is printed, with
            blast_search.progress.Reporter() it is on stderr.

    Returns:
        The finished run.

    Raises:
        InfeasibleBudgetError: no plan meets the budgets; the nearest one is in plan.json.
        UsageError, IncompatibleInputError, RunLockedError: see blast_search.errors.
    """
    space_name = space.name if isinstance(space, SearchSpace) else str(space or "default")
    settings = Settings(
        task_name(task), budget, budget_scope, max_drop, space_name,
        workload, device, dtype, mode, profile, storage, trials, time_limit, retrain_steps, seed,
        every_workload,
    )  # fmt: skip
    if not resume:  # else those on file count, and are checked as they are read
        settings.check()
    with opened(settings, task, space, out, resume, workers, ray_address, report) as pipeline:
        return pipeline.run()


def task_name(task: Task | str) -> str:
    """What a task is called in config.yaml; UsageError for an object that is no task."""
    from blast_search.tasks import check_task

    return task if isinstance(task, str) else check_task(type(task).__name__, task).name


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

    began = time.monotonic()
    check_workers(workers, ray_address)
    loaded = load_task(task) if isinstance(task, str) else task
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path(out) if out else Path("results") / f"{loaded.name}-{stamp}"
    if (folder / ".lock").is_file():  # in use: said before that it holds a run already
        with locked(folder):
            pass
    if resume:
        stored = stored_settings(folder, type(settings))
        if loaded.name == stored.task:  # of a run that was started with an object
            settings = replace(settings, task=stored.task)
    else:
        chosen = space if isinstance(space, SearchSpace) else load_space(settings.space)
        if settings.storage:
            check_database(settings.storage)
        prepared = prepare(loaded, settings, chosen)
        read_calibration(prepared, settings.seed)
        tried_loss(loaded, prepared.model, settings.retrain_steps, settings.seed)
        kept = replace(settings, storage=without_password(settings.storage))
        start_folder(folder, asdict(kept) | {"workers": workers}, space_values(chosen))
    with locked(folder):
        report.opened(folder)
        if resume:
            settings = _continued(folder, settings, stored, space)
            if settings.storage:
                check_database(settings.storage)
            prepared = prepare(loaded, settings, kept_space(folder, settings.space))
            read_calibration(prepared, settings.seed)
            check_layers(folder, prepared.layers, prepared.data_digest)
        yield Pipeline(folder, settings, prepared, workers, ray_address, report, began)


def _continued(
    folder: Path, asked: Settings, stored: Settings, space: SearchSpace | str | Path | None
) -> Settings:
    """The settings of the run to resume; what is asked for beside defaults must agree.

    But for the storage: it may have moved, and its password is not on file.
    """
    default = type(asked)(task=stored.task)  # a task is asked for, also the default one
    changed = [
        f.name
        for f in fields(asked)
        if f.name != "storage"
        and getattr(asked, f.name) not in (getattr(default, f.name), getattr(stored, f.name))
    ]
    if isinstance(space, SearchSpace):
        same = space_values(space) == space_values(kept_space(folder, stored.space))
        changed += [] if same or "space" in changed else ["space"]
    if changed:
        raise UsageError(
            f"{folder} is continued as it was started; {', '.join(changed)} cannot change. Leave "
            "them out, or start a new run."
        )
    return replace(stored, storage=asked.storage or stored.storage)


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
        started: float,
    ) -> None:
        self.folder, self.settings, self.prepared = folder, settings, prepared
        self.workers, self.ray_address, self.report = workers, ray_address, report
        self.records = RunFolder.open(folder)
        self.started = started  # before the task's model was built, which may take long
        self.dense_metric = float("nan")
        self.latency_check: dict[str, float] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """What the stages took, in all sessions that worked on the run."""
        return self.records.seconds

    def took(self, stage: str, since: float) -> None:
        self.records.took(stage, time.monotonic() - since)

    @property
    def search_deadline(self) -> Deadline:
        """The search may use half of --time-limit (minutes)."""
        limit = self.settings.time_limit
        return FOREVER if limit is None else Deadline(self.started + 30 * limit)

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
        # First: a folder from another device is refused before anything in it is changed.
        table = LatencyTable.open(self.folder / "latency.csv", p.fingerprint, p.mode)
        write_json(self.folder / "layers.json", p.listing())
        write_json(self.folder / "environment.json", p.environment)
        say(
            f"{p.task.name}: {len(p.layers)} Linear layers to search ({100 * p.share:.1f} % of "
            f"the parameters), {len(p.skipped)} left alone, on {p.environment['device']} "
            f"({p.environment['dtype']})"
        )
        if p.note:
            say(p.note)
        # Before minutes are spent on measuring: what a task's own code gets wrong is seen now.
        self.dense_metric = float(
            self.records.once("metric", "dense", "dense", lambda: evaluate(p.task, p.model))
        )
        say(f"dense model: {p.task.metric[0]} {self.dense_metric:.4g}")
        check_calls(p.model, p.workloads, p.mode)
        if p.steered:
            say(STEERED.format(len(p.steered), p.steered[0]))
        since = time.monotonic()
        self.profiler(table).run(self.settings.profile)
        self.took("profile", since)
        names = [w.name for w in p.workloads] if self.settings.every_workload else []
        latency = self.checked(LatencyModel(p.layers, table, workloads=names))
        since = time.monotonic()
        engine = self.scored(latency)
        self.took("score", since)
        return engine

    def profiler(self, table: LatencyTable) -> Profiler:
        return Profiler(self.prepared, table, self.workers, self.ray_address, self.report)

    def checked(self, latency: LatencyModel) -> LatencyModel:
        """The latency model, corrected by random plans; its error on those outside the fit."""
        p, since = self.prepared, time.monotonic()
        if p.steered:  # random plans would be other work
            return latency
        plans = measure_plans(
            p.model, latency, p.workloads, self.records, self.report, self.settings.seed,
            mode=p.mode, expired=self.search_deadline.share(CHECK_SHARE).expired,
        )  # fmt: skip
        self.latency_check = cross_validated(plans)
        latency.factors = correction(plans)
        self.took("latency check", since)
        return latency

    def settle(self, engine: Engine, target: float) -> None:
        """Measure again the cells whose noise could flip the exact plan; once per run.

        The new measurements go to measured.csv, not to latency.csv: up to here, a resumed run must
        see the table that the run saw.
        """

        def measure() -> list[dict[str, Any]]:
            late = engine.deadline.expired()
            cells = [] if late else doubtful(engine, target)
            return self.profiler(engine.latency.table).again(cells)

        rows = self.records.once("doubtful cells", f"{target:.4f}", "exact", measure)
        again = LatencyTable(self.prepared.fingerprint)
        again.add_rows(rows, "measured.csv, doubtful cells")
        table = replace(engine.latency.table, path=None)
        table.merge(again)  # the more certain measurement counts
        engine.latency.table_changed()

    def scored(self, latency: LatencyModel) -> Engine:
        """Calibrate, probe and score: everything that the solver needs."""
        p = self.prepared
        deadline = self.search_deadline.share(SCORE_SHARE)
        # A resumed run skips measurements that draw random numbers, and must draw the same.
        torch.manual_seed(self.settings.seed)
        batches = p.batches
        with self.report.stage("calibrate", 1) as advance:
            grams = collect_grams(p.model, p.layers, batches)
            advance()
        ranks = {
            ly.name: max((c.rank for c in p.space.candidates(ly)), default=0) for ly in p.layers
        }
        judge = Judge(
            p.model, p.layers, Fitter(p.model, p.layers, grams, ranks), batches, p.references
        )
        panel = Panel(
            judge, self.report, resolve(self.workers) == "ray", self.ray_address, p.fingerprint,
            p.device.type, self.settings.dtype,
        )  # fmt: skip
        probes = ProbeTable.open(self.folder / "probes.csv")
        scorer = estimate_scores(
            p.layers, p.space, latency.table, panel, probes, self.report, deadline
        )
        scores = scorer.table(p.layers)
        write_rows(self.folder / "scores.csv", ScoreTable.FIELDS, scores.rows())
        return Engine(
            p.model, p.layers, p.space, p.workloads, panel, latency, scorer, scores,
            self.records, self.report, self.settings.budget_scope, p.mode, self.search_deadline,
            steered=bool(p.steered),
        )  # fmt: skip
