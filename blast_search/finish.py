"""From the decision to a finished run: build, judge, retrain, save, write down."""

from __future__ import annotations

import math
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from torch import nn

from blast_search.closed_loop import TIMING_SECONDS
from blast_search.decision import decide, infeasible
from blast_search.describe import DENSE_KEY, Describer, write_front
from blast_search.document import show
from blast_search.drop import within_drop
from blast_search.engine import Contender, Engine
from blast_search.errors import InfeasibleBudgetError
from blast_search.evaluate import (
    count_macs,
    count_params,
    worse_by,
)
from blast_search.files import make_folder, sha256_json
from blast_search.filling import FILLED, filled
from blast_search.last_timing import FINAL_SECONDS, Decision
from blast_search.model_latency import Timing
from blast_search.models import Models
from blast_search.plan import CHOSEN, FrontPoint, Plan
from blast_search.settings import layer_target
from blast_search.solver import TOLERANCE
from blast_search.space import DENSE
from blast_search.storage import Storage

if TYPE_CHECKING:
    from blast_search.pipeline import Pipeline


# Settings in which runs that share a study may differ: losses compare all the same.
OWN = ("max_drop", "profile", "storage", "trials", "time_limit", "retrain_steps", "seed")


class Finish:
    """The last stages of one run."""

    def __init__(self, pipeline: Pipeline, engine: Engine) -> None:
        self.pipeline, self.engine = pipeline, engine
        self.settings, self.prepared = pipeline.settings, pipeline.prepared
        self.records, self.report = pipeline.records, pipeline.report
        self.folder: Path = pipeline.folder
        p = self.prepared
        self.params = count_params(p.model)
        self.macs = count_macs(p.model, p.workloads)
        sizes = {
            "macs": (sum(ly.macs(DENSE) for ly in p.layers), self.macs),
            "params": (float(sum(ly.params(DENSE) for ly in p.layers)), float(self.params)),
        }
        part, whole = sizes.get(self.settings.budget_scope, (1.0, 1.0))
        engine.outside = 1 - part / max(whole, 1.0)
        self.describer = Describer(pipeline, engine, self.params, self.macs)
        self.models = Models(pipeline, engine)

    # ---- the two ways to a decision -----------------------------------------------------

    def dense_timing(self) -> Timing:
        # Only scope "model" turns these two numbers into a target.
        seconds = FINAL_SECONDS if self.settings.budget_scope == "model" else TIMING_SECONDS
        return self.engine.time("dense", {"dense": self.engine.dense}, seconds)[0]

    def decide(self) -> Decision:
        """The decision for a budget, or for --max-drop alone."""
        s, engine, dense = self.settings, self.engine, self.dense_timing()
        if s.budget_scope == "model":
            engine.outside = min(dense.fixed_ms / dense.dense_ms, 0.999)
        storage = Storage(f"sqlite:///{self.folder / 'study.db'}")
        if s.storage:
            # A database may hold the studies of many runs.  Runs of one folder name that ask
            # the same question, on several machines for instance, work on one study.
            same = {key: v for key, v in asdict(s).items() if key not in OWN}
            layers = [[ly.name, *ly.shape] for ly in engine.layers]
            question = [same, layers, self.prepared.fingerprint]  # plans fit one device's table
            name = f"{storage.study}-{self.folder.resolve().name}-{sha256_json(question)[:8]}"
            me = self.records.once("worker", "worker", "study", lambda: uuid4().hex)
            storage = Storage(s.storage, name, f"{platform.node()}:{me}")
        if s.budget is not None:
            target = layer_target(s.budget, engine.outside)
            self.pipeline.settle(self.engine, target)
            return decide(
                engine, target, dense, s.trials, storage, s.seed,
                self.models.recovered if self.models.short_steps else None,
            )  # fmt: skip
        return within_drop(self, dense, storage)

    # ---- the end ------------------------------------------------------------------------

    def run(self) -> tuple[Plan, list[FrontPoint], nn.Module, InfeasibleBudgetError | None]:
        """Everything after scoring; the error is what to raise once all files are written."""
        p, s, engine = self.prepared, self.settings, self.engine
        since = time.monotonic()
        decision = self.decide()
        self.pipeline.took("search", since)
        winner = decision.winner
        points = self.describer.points(decision)
        search_seconds = round(sum(self.pipeline.seconds.values()), 1)
        self.report.say(f"search finished after {search_seconds:.0f} s")
        if s.every_workload:
            each = self.describer.by_workload(winner.timing).items()
            text = ", ".join(f"{name} {show(ratio)}" for name, ratio in each)
            self.report.say(f"layer latency ratio by workload: {text}")
        plan = self.describer.plan(decision)
        make_folder(self.folder / "plans")
        if not decision.met:
            plan.save(self.folder / "plan.json")
            assert s.budget is not None
            missed = infeasible(
                self.folder, s.budget_scope, s.budget, decision, engine.outside, s.every_workload
            )
            return plan, points, p.model, missed
        since = time.monotonic()
        contenders = {"searched": winner} | decision.baselines
        metrics = {key: self.models.metric(c) for key, c in contenders.items()}
        # On file before retraining, whatever a task's own loss then raises.
        self.describer.plan(decision, winner, metrics).save(self.folder / "plan.json")
        write_front(self.folder, points)
        steps = 0 if winner.all_dense else self.models.steps(winner, len(contenders))
        after = self.after(decision, contenders, steps)
        key = self.best(contenders, after or metrics)
        if larger := self.filled(decision, contenders[key]):
            contenders[FILLED] = larger
            decision = replace(decision, baselines=decision.baselines | {FILLED: larger})
            metrics[FILLED] = self.models.metric(larger)
            after |= self.after(decision, {FILLED: larger}, steps)
            key = self.best(contenders, after or metrics)
        values = dict(after or metrics)
        if self.allows_dense(decision, values[key]):
            key, metrics[DENSE_KEY] = DENSE_KEY, self.pipeline.dense_metric
            values[key] = metrics[key]
            contenders[key] = Contender(key, engine.dense, self.dense_timing(), 1.0, True)
        if key != "searched":
            best = contenders[key].choices
            engine.note_point(CHOSEN, best, engine.true_loss(CHOSEN, best))
            points = self.describer.points(decision)
        self.pipeline.took("retrain", since)
        error = self.drop_error(values[key])
        plan = self.describer.plan(decision, contenders[key], metrics, after, error is None)
        trained = bool(steps) and key != DENSE_KEY
        if trained:
            self.models.retrained(key, contenders[key], plan, steps)
        model = self.models.keep(key, contenders[key], plan, trained)
        for name, contender in contenders.items():
            self.describer.plan(decision, contender, metrics, after).save(
                self.folder / "plans" / f"{name.replace('_', '-')}.json"
            )
        plan = Plan.load(self.folder / "model")
        plan.save(self.folder / "plan.json")
        return plan, points, model, error

    def after(
        self, decision: Decision, contenders: dict[str, Contender], steps: int
    ) -> dict[str, float]:
        """The metric of each contender after retraining; nothing where there is none."""
        try:
            return {
                key: self.models.retrained(
                    key, c, self.describer.plan(decision, c), steps, weights=False
                )
                for key, c in contenders.items()
                if steps
            }
        except Exception as error:
            error.add_note(
                "Retraining failed; the plan before it is on file, and `blast-search apply "
                f"{self.folder / 'plan.json'} --out DIR` builds its model."
            )
            raise

    def filled(self, decision: Decision, best: Contender) -> Contender | None:
        """A larger plan made of a uniform one that won (filling.py), where there is time."""
        asked = self.settings.budget is not None and self.settings.time_limit is None
        if not asked or not best.name.startswith("uniform"):
            return None
        with self.engine.latency.kept():  # predictions on file are those of the decision
            return filled(self.engine, decision, best)

    def best(self, contenders: dict[str, Contender], values: dict[str, float]) -> str:
        """The contender within the budget with the best metric; the searched plan wins ties.

        Rankings can flip in retraining: a uniform plan that recovered better is taken instead.
        """
        sign = 1 if self.prepared.task.metric[1] else -1
        feasible = [key for key, c in contenders.items() if c.feasible or key == "searched"]
        return max(feasible, key=lambda key: (sign * values[key], key == "searched"))

    def allows_dense(self, decision: Decision, value: float) -> bool:
        """Whether the dense model is within the budget, too, and has a better metric."""
        dense = self.pipeline.dense_metric
        within = self.settings.budget is not None and decision.target >= 1 - TOLERANCE
        return within and worse_by(self.prepared.task, value, dense) > 0

    def drop_error(self, value: float) -> InfeasibleBudgetError | None:
        """The error for a metric that fell by more than --max-drop."""
        s, task = self.settings, self.prepared.task
        drop = worse_by(task, value, self.pipeline.dense_metric)
        if s.max_drop is None or drop <= s.max_drop:
            return None
        moves = f"{task.metric[0]} {'falls' if task.metric[1] else 'rises'} by {drop:.4g}"
        if s.budget is None:
            return InfeasibleBudgetError(
                f"no plan keeps --max-drop {s.max_drop:g}: {moves} with the plan that kept it "
                "before, or with none replaced. Have evaluate() give the same number each time "
                f"(seed what it draws). The nearest plan is in {self.folder / 'plan.json'}."
            )
        held = drop
        if math.isfinite(drop):  # rounded up: the drop that is named must do
            step = 10.0 ** (math.floor(math.log10(drop)) - 2)
            held = math.ceil(drop / step) * step
        return InfeasibleBudgetError(
            f"no plan meets both budgets: at budget {s.budget:g} (scope {s.budget_scope}) "
            f"{moves}, more than --max-drop {s.max_drop:g}; the "
            f"smallest --max-drop that this budget held is {held:.3g}. --max-drop {s.max_drop:g} "
            "without --budget finds the fastest plan within it; more --retrain-steps may help. "
            f"The nearest plan is in {self.folder / 'plan.json'}."
        )
