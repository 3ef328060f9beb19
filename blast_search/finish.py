"""From the decision to a finished run: build, judge, retrain, save, write down."""

from __future__ import annotations

import copy
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from blast_search.apply import attach, copied, final_modules, load, save
from blast_search.closed_loop import TIMING_SECONDS
from blast_search.decision import FINAL_SECONDS, Decision, decide, infeasible, layer_target
from blast_search.describe import Describer
from blast_search.drop import within_drop
from blast_search.engine import Contender, Engine
from blast_search.errors import IncompatibleInputError, InfeasibleBudgetError
from blast_search.evaluate import (
    count_macs,
    count_params,
    evaluate,
    worse_by,
)
from blast_search.files import make_folder, sha256_json
from blast_search.judge import BROKEN
from blast_search.model_latency import Timing
from blast_search.plan import FrontPoint, Plan
from blast_search.retrain import DEFAULT_LEARNING_RATE, DEFAULT_STEPS, retrain
from blast_search.runfolder import digest
from blast_search.space import DENSE
from blast_search.study import Storage

if TYPE_CHECKING:
    from blast_search.pipeline import Pipeline

SLOWER = 4  # a retraining that made things worse gets a learning rate so many times lower
SHORT = 5  # a short retraining takes one in so many steps


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
        self.share = part / max(whole, 1.0)
        self.describer = Describer(pipeline, engine, self.params, self.macs)

    # ---- building and judging -----------------------------------------------------------

    def build(self, contender: Contender, plan: Plan) -> nn.Module:
        """A new model with the contender's layers, factors of final quality."""
        chosen = {name: c for name, c in contender.choices.items() if not c.is_dense}
        model = copied(self.prepared.model, self.prepared.layers, chosen)
        modules: dict[str, nn.Module] = {}
        with self.report.stage(f"factorise {contender.name}", len(chosen)) as advance:
            for name, candidate in chosen.items():
                modules |= final_modules(self.engine.fitter, {name: candidate})
                advance()
        attach(model, self.prepared.layers, modules, plan)
        return model

    def metric(self, contender: Contender, plan: Plan) -> float:
        """The metric before retraining; the worst number there is where it is not finite."""
        task = self.prepared.task

        def judged() -> float:
            model = self.build(contender, plan)
            try:
                return evaluate(task, model)
            except IncompatibleInputError as error:  # no reason to lose the other contenders
                self.report.say(f"{contender.name}: {error}")
                return -BROKEN if task.metric[1] else BROKEN

        return float(
            self.records.once("metric", digest(contender.choices), contender.name, judged)
        )

    @property
    def full_steps(self) -> int:
        """Retraining steps as asked, or the task's recipe."""
        asked = self.settings.retrain_steps
        recipe = getattr(self.prepared.task, "train_steps", DEFAULT_STEPS)
        return int(recipe if asked is None else asked)

    def steps(self, contender: Contender, contenders: int) -> int:
        """Retraining steps: as asked, the task's recipe, or what the time limit leaves."""
        task, limit, steps = self.prepared.task, self.settings.time_limit, self.full_steps
        if limit is None or steps == 0:
            return steps

        def affordable() -> int:
            model = self.build(contender, _blank())
            retrain(task, model, self.prepared.model, 1, self.settings.seed)
            begin = time.monotonic()
            retrain(task, model, self.prepared.model, 3, self.settings.seed)
            per_step = (time.monotonic() - begin) / 3
            left = 60 * limit - (time.monotonic() - self.pipeline.started)
            return max(1, min(steps, int(0.8 * left / contenders / per_step)))

        return int(self.records.once("steps", "steps", "retraining steps", affordable))

    @property
    def short_steps(self) -> int:
        """Steps of the short retraining that decides between close plans; 0: none.

        A time limit is left to the retraining that lasts.
        """
        return 0 if self.settings.time_limit is not None else self.full_steps // SHORT

    def recovered(self, contender: Contender) -> float:
        """How far the metric is behind dense after `short_steps` of retraining."""
        p, steps = self.prepared, self.short_steps

        def train() -> float:
            model, name = self.build(contender, _blank()), f"short retraining of {contender.name}"
            retrain(
                p.task, model, p.model, steps, self.settings.seed, report=self.report, name=name
            )
            return worse_by(p.task, evaluate(p.task, model), self.pipeline.dense_metric)

        kind = f"behind after {steps} steps"
        return float(self.records.once(kind, digest(contender.choices), contender.name, train))

    def retrained(
        self, key: str, contender: Contender, plan: Plan, steps: int, weights: bool = True
    ) -> float:
        """The metric after `steps` of retraining; the model is kept in models/<key>.

        Without `weights` a value on file will do, even if the model is there no more.
        """
        folder = self.folder / "models" / key
        kind = f"retrained {steps} steps"
        known = (kind, digest(contender.choices))
        if weights and not self.holds(key, contender):
            twin = self.twin(key, contender)
            if twin and known in self.records.measured:  # a uniform plan won: trained once
                shutil.copytree(twin, folder, dirs_exist_ok=True)
            else:
                # The weights were lost (a kill between two files) or are another plan's: train
                # again, with the same seed.
                self.records.measured.pop(known, None)

        def train() -> float:
            model, value = self.trained(key, contender, plan, steps, self.settings.seed)
            save(model, folder, plan)
            return value

        return float(self.records.once(*known, key, train))

    def twin(self, key: str, contender: Contender) -> Path | None:
        """Another contender's folder with the weights of the same plan."""
        folders = sorted((self.folder / "models").glob("*"))
        return next((f for f in folders if f.name != key and self.holds(f.name, contender)), None)

    def holds(self, key: str, contender: Contender) -> bool:
        """Whether models/<key> holds this contender's weights."""
        folder = self.folder / "models" / key
        return (folder / "plan.json").is_file() and Plan.load(folder).choices == contender.choices

    def trained(
        self, key: str, contender: Contender, plan: Plan, steps: int, seed: int
    ) -> tuple[nn.Module, float]:
        """The contender's model and metric after `steps` of retraining.

        Retraining that makes the metric worse (a rate too high for the task, or a few steps of
        Adam, all that a time limit left) is thrown away and tried once more at a lower rate, where
        there is time; if that does no better, the fitted factors are kept as they are.
        """
        p, before = self.prepared, self.metric(contender, plan)
        rate = float(getattr(p.task, "learning_rate", DEFAULT_LEARNING_RATE))
        for lower in (1, SLOWER) if self.settings.time_limit is None else (1,):
            model = self.build(contender, plan)
            name = f"retrain {key}" + (f" at 1/{lower} of the rate" if lower > 1 else "")
            try:
                retrain(p.task, model, p.model, steps, seed, rate / lower, self.report, name)
                value = evaluate(p.task, model)
                harm = f"made {key} worse ({before:.4f} before, {value:.4f} after)"
            except IncompatibleInputError as error:
                value, harm = float("nan"), f"failed for {key} ({error})"
            if worse_by(p.task, value, before) <= 0:
                return model, value
            self.report.say(
                f"{steps} steps of retraining at a learning rate of {rate / lower:g} {harm}, "
                f"judged by {p.task.metric[0]}: they are not kept."
            )
            del model
        return self.build(contender, plan), before

    # ---- the two ways to a decision -----------------------------------------------------

    def dense_timing(self) -> Timing:
        dense = {layer.name: DENSE for layer in self.prepared.layers}
        # Only scope "model" turns these two numbers into a target.
        seconds = FINAL_SECONDS if self.settings.budget_scope == "model" else TIMING_SECONDS
        return self.engine.time("dense", {"dense": dense}, seconds)[0]

    def decide(self) -> Decision:
        """The decision for a budget, or for --max-drop alone."""
        s, engine, dense = self.settings, self.engine, self.dense_timing()
        storage = Storage(f"sqlite:///{self.folder / 'study.db'}")
        if s.storage:
            # A database may hold the studies of many runs.  Runs of one folder name that ask
            # the same question, on several machines for instance, work on one study.
            path = self.folder.resolve()
            question = [s.budget, s.budget_scope, [[ly.name, *ly.shape] for ly in engine.layers]]
            name = f"{storage.study}-{path.name}-{sha256_json(question)[:8]}"
            storage = Storage(s.storage, name, f"{platform.node()}:{path}")
        if s.budget is not None:
            target = layer_target(s.budget_scope, s.budget, dense, self.share)
            self.pipeline.settle(self.engine, target)
            return decide(
                engine, target, dense, s.trials, storage, s.seed, self.pipeline.search_deadline,
                self.recovered if self.short_steps else None,
            )  # fmt: skip
        return within_drop(self, dense, storage)

    # ---- the end ------------------------------------------------------------------------

    def run(self) -> tuple[Plan, list[FrontPoint], nn.Module, InfeasibleBudgetError | None]:
        """Everything after scoring; the error is what to raise once all files are written."""
        p, s, engine = self.prepared, self.settings, self.engine
        since = time.monotonic()
        decision = self.decide()
        self.pipeline.seconds["search"] = round(time.monotonic() - since, 1)
        winner = decision.winner
        points = engine.settled_points(winner, list(decision.baselines.values()))
        search_seconds = round(sum(self.pipeline.seconds.values()), 1)
        self.report.say(f"search finished after {search_seconds:.0f} s")
        if s.every_workload:
            each = self.describer.by_workload(winner.timing).items()
            text = ", ".join(f"{name} {ratio:.3f}" for name, ratio in each)
            self.report.say(f"layer latency ratio by workload: {text}")
        plan = self.describer.plan(decision)
        make_folder(self.folder / "plans")
        if not decision.met:
            plan.save(self.folder / "plan.json")
            assert s.budget is not None
            missed = infeasible(s.budget_scope, s.budget, decision, self.share)
            return plan, points, p.model, missed
        since = time.monotonic()
        contenders = {"searched": decision.winner} | decision.baselines
        metrics = {key: self.metric(c, plan) for key, c in contenders.items()}
        steps = 0 if decision.winner.all_dense else self.steps(decision.winner, len(contenders))
        after = {
            key: self.retrained(key, c, self.describer.plan(decision, c), steps)
            for key, c in contenders.items()
            if steps
        }
        self.pipeline.seconds["retrain"] = round(time.monotonic() - since, 1)
        key = self.best(contenders, after or metrics)
        error = self.drop_error((after or metrics)[key])
        plan = self.describer.plan(decision, contenders[key], metrics, after, error is None)
        model = self.keep_model(key, contenders[key], plan, bool(steps))
        for name, contender in contenders.items():
            self.describer.plan(decision, contender, metrics, after).save(
                self.folder / "plans" / f"{name.replace('_', '-')}.json"
            )
        plan = Plan.load(self.folder / "model")
        plan.save(self.folder / "plan.json")
        return plan, points, model, error

    def best(self, contenders: dict[str, Contender], values: dict[str, float]) -> str:
        """The contender within the budget with the best metric; the searched plan wins ties.

        Rankings can flip in retraining: a uniform plan that recovered better is taken instead.
        """
        sign = 1 if self.prepared.task.metric[1] else -1
        feasible = [key for key, c in contenders.items() if c.feasible or key == "searched"]
        return max(feasible, key=lambda key: (sign * values[key], key == "searched"))

    def drop_error(self, value: float) -> InfeasibleBudgetError | None:
        """The error for a metric that fell by more than --max-drop."""
        s, task = self.settings, self.prepared.task
        drop = worse_by(task, value, self.pipeline.dense_metric)
        if s.max_drop is None or drop <= s.max_drop:
            return None
        return InfeasibleBudgetError(
            f"no plan meets both budgets: at budget {s.budget} (scope {s.budget_scope}) "
            f"{task.metric[0]} falls by {drop:.4f}, more than --max-drop {s.max_drop:g}. "
            "Allow more drop, a larger budget or more --retrain-steps, or leave --budget out: "
            "--max-drop alone finds the fastest plan within it. The nearest plan is in plan.json."
        )

    def keep_model(self, key: str, winner: Contender, plan: Plan, trained: bool) -> nn.Module:
        """The winner's model in model/, with the final plan beside its weights."""
        source = self.folder / "models" / key
        if trained:
            model = load(source, lambda: copy.deepcopy(self.prepared.model))
        else:
            model = self.build(winner, plan)
        target = save(model, self.folder / "model", plan)
        model.blast_plan = Plan.load(target)  # type: ignore[assignment]
        if (self.folder / "models").is_dir():
            shutil.rmtree(self.folder / "models")
        return model


def _blank() -> Plan:
    return Plan(model={}, layers={})
