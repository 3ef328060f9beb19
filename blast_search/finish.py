"""From the decision to a finished run: build, judge, retrain, save, write down."""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr
from torch import nn

from blast_search.apply import attach, final_modules, load, model_fingerprint, save
from blast_search.decision import Decision, decide, infeasible, layer_target
from blast_search.engine import FINAL_SECONDS, TIMING_SECONDS, Contender, Engine, peak_memory_mb
from blast_search.errors import InfeasibleBudgetError
from blast_search.evaluate import (
    count_macs,
    count_params,
    describe_workloads,
    evaluate,
    size_ratios,
    worse_by,
)
from blast_search.files import make_folder, write_rows
from blast_search.latency import Timing
from blast_search.latency_model import error_statistics
from blast_search.plan import FrontPoint, LayerPlan, Plan, pareto
from blast_search.retrain import DEFAULT_STEPS, retrain
from blast_search.runfolder import digest
from blast_search.space import DENSE
from blast_search.study import Storage

if TYPE_CHECKING:
    from blast_search.pipeline import Pipeline

DROP_ROUNDS = 5


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

    # ---- building and judging -----------------------------------------------------------

    def build(self, contender: Contender, plan: Plan) -> nn.Module:
        """A new model with the contender's layers, factors of final quality."""
        model = copy.deepcopy(self.prepared.model)
        chosen = {name: c for name, c in contender.choices.items() if not c.is_dense}
        modules: dict[str, nn.Module] = {}
        with self.report.stage(f"factorise {contender.name}", len(chosen)) as advance:
            for name, candidate in chosen.items():
                modules |= final_modules(self.engine.fitter, {name: candidate})
                advance()
        attach(model, self.prepared.layers, modules, plan)
        return model

    def metric(self, contender: Contender, plan: Plan) -> float:
        """The metric before retraining."""
        task = self.prepared.task
        return float(
            self.records.once(
                "metric",
                digest(contender.choices),
                contender.name,
                lambda: evaluate(task, self.build(contender, plan)),
            )
        )

    def steps(self, contender: Contender, contenders: int) -> int:
        """Retraining steps: as asked, the task's recipe, or what the time limit leaves."""
        task, limit = self.prepared.task, self.settings.time_limit
        asked = self.settings.retrain_steps
        steps = int(getattr(task, "train_steps", DEFAULT_STEPS)) if asked is None else asked
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

    def retrained(self, key: str, contender: Contender, plan: Plan, steps: int) -> float:
        """The metric after `steps` of retraining; the model is kept in models/<key>."""
        p, seed = self.prepared, self.settings.seed
        folder = self.folder / "models" / key
        kind = f"retrained {steps} steps"
        if not _holds(folder, contender):
            # The weights were lost (a kill between two files) or are another plan's: train
            # again, with the same seed.
            self.records.measured.pop((kind, digest(contender.choices)), None)

        def train() -> float:
            model = self.build(contender, plan)
            retrain(p.task, model, p.model, steps, seed, report=self.report, name=f"retrain {key}")
            value = evaluate(p.task, model)
            save(model, folder, plan)
            return value

        return float(self.records.once(kind, digest(contender.choices), key, train))

    # ---- the two ways to a decision -----------------------------------------------------

    def dense_timing(self) -> Timing:
        dense = {layer.name: DENSE for layer in self.prepared.layers}
        # Only scope "model" turns these two numbers into a target.
        seconds = FINAL_SECONDS if self.settings.budget_scope == "model" else TIMING_SECONDS
        return self.engine.time("dense", {"dense": dense}, seconds)[0]

    def decide(self) -> Decision:
        """The decision for a budget, or for --max-drop alone."""
        s, dense = self.settings, self.dense_timing()
        storage = Storage(f"sqlite:///{self.folder / 'study.db'}")
        if s.storage:  # a database may hold the studies of many runs
            storage = Storage(s.storage, f"{storage.study}-{self.folder.resolve().name}")
        if s.budget is not None:
            target = layer_target(s.budget_scope, s.budget, dense, self.share)
            return decide(
                self.engine, target, dense, s.trials, storage, s.seed,
                self.pipeline.search_expired,
            )  # fmt: skip
        return self.within_drop(dense)

    def within_drop(self, dense: Timing) -> Decision:
        """The fastest plan whose metric after retraining falls by at most max_drop (bisection)."""
        assert self.settings.max_drop is not None
        task, engine = self.prepared.task, self.engine
        nothing = {layer.name: DENSE for layer in self.prepared.layers}
        best = Contender("dense", nothing, dense, 1.0, True)
        low, high = 0.0, 1.0
        for _ in range(DROP_ROUNDS):
            middle = (low + high) / 2
            contender = engine.meet("exact", engine.exact, middle)
            if contender is None or not contender.feasible:
                low = middle
                continue
            steps = self.steps(contender, DROP_ROUNDS)
            blank = _blank()
            value = (
                self.retrained("searched", contender, self.plan_for(contender, middle), steps)
                if steps
                else self.metric(contender, blank)
            )
            drop = worse_by(task, value, self.pipeline.dense_metric)
            self.report.say(
                f"layer ratio {contender.ratio:.3f}: {task.metric[0]} {value:.4f} "
                f"({drop:+.4f} worse than dense)"
            )
            loss = engine.true_loss("exact", contender.choices)
            engine.note_point(f"exact {middle:.2f}", middle, contender.choices, loss)
            if drop <= self.settings.max_drop:
                best, high = contender, contender.ratio
            else:
                low = middle
        return Decision(best, {}, best.ratio, dense, 0, True)

    def plan_for(self, contender: Contender, target: float) -> Plan:
        layers = {
            ly.name: LayerPlan.of(ly, contender.choices[ly.name]) for ly in self.prepared.layers
        }
        return replace(_blank(), layers=layers, budget={"layer_target": target})

    # ---- the end ------------------------------------------------------------------------

    def run(self) -> tuple[Plan, list[FrontPoint], nn.Module, InfeasibleBudgetError | None]:
        """Everything after scoring; the error is what to raise once all files are written."""
        p, s, engine, task = self.prepared, self.settings, self.engine, self.prepared.task
        since = time.monotonic()
        decision = self.decide()
        self.pipeline.seconds["search"] = round(time.monotonic() - since, 1)
        winner = decision.winner
        engine.points.append(
            FrontPoint(
                "searched",
                decision.target,
                winner.timing.ratio_layers,
                True,
                engine.predicted_loss(winner.choices),
                engine.true_loss("searched", winner.choices),
                winner.choices,
            )
        )
        search_seconds = round(sum(self.pipeline.seconds.values()), 1)
        self.report.say(f"search finished after {search_seconds:.0f} s")
        plan = self.describe(decision)
        make_folder(self.folder / "plans")
        if not decision.met:
            plan.save(self.folder / "plan.json")
            assert s.budget is not None
            missed = infeasible(s.budget_scope, s.budget, decision, self.share)
            return plan, engine.points, p.model, missed
        since = time.monotonic()
        contenders = {"searched": decision.winner} | decision.baselines
        metrics = {key: self.metric(c, plan) for key, c in contenders.items()}
        steps = 0 if decision.winner.all_dense else self.steps(decision.winner, len(contenders))
        after = {
            key: self.retrained(key, c, self.describe(decision, c), steps)
            for key, c in contenders.items()
            if steps
        }
        self.pipeline.seconds["retrain"] = round(time.monotonic() - since, 1)
        final = after.get("searched", metrics["searched"])
        error: InfeasibleBudgetError | None = None
        if s.max_drop is not None:
            drop = worse_by(task, final, self.pipeline.dense_metric)
            if drop > s.max_drop:
                error = InfeasibleBudgetError(
                    f"no plan meets both budgets: at budget {s.budget} (scope {s.budget_scope}) "
                    f"{task.metric[0]} falls by {drop:.4f}, more than --max-drop {s.max_drop:g}. "
                    "Allow more drop, a larger budget, or more --retrain-steps. The nearest plan "
                    "is in plan.json."
                )
        plan = self.describe(decision, None, metrics, after, error is None)
        model = self.keep_model(decision.winner, plan, bool(steps))
        for key, contender in contenders.items():
            self.describe(decision, contender, metrics, after).save(
                self.folder / "plans" / f"{key.replace('_', '-')}.json"
            )
        plan = model.blast_plan if isinstance(model.blast_plan, Plan) else plan
        plan.save(self.folder / "plan.json")
        return plan, engine.points, model, error

    def keep_model(self, winner: Contender, plan: Plan, trained: bool) -> nn.Module:
        """The winner's model in model/, with the final plan beside its weights."""
        source = self.folder / "models" / "searched"
        if trained:
            model = load(source, lambda: copy.deepcopy(self.prepared.model))
        else:
            model = self.build(winner, plan)
        target = save(model, self.folder / "model", plan)
        model.blast_plan = Plan.load(target)  # type: ignore[assignment]
        if (self.folder / "models").is_dir():
            shutil.rmtree(self.folder / "models")
        return model

    def describe(
        self,
        decision: Decision,
        contender: Contender | None = None,
        metrics: dict[str, float] | None = None,
        after: dict[str, float] | None = None,
        met: bool | None = None,
    ) -> Plan:
        """The plan of a contender (default: the winner) with all that is known of it."""
        p, s, engine = self.prepared, self.settings, self.engine
        metrics, after = metrics or {}, after or {}
        chosen = contender or decision.winner
        key = next((k for k, c in decision.baselines.items() if c is chosen), "searched")
        dense, t = decision.dense, chosen.timing
        span = dense.dense_ms - dense.fixed_ms
        ratio = engine.latency.ratio(chosen.choices, 1.0)
        metric: dict[str, Any] = {
            "name": p.task.metric[0],
            "higher_is_better": p.task.metric[1],
            "dense": self.pipeline.dense_metric,
        }
        baselines: dict[str, Any] = {
            "dense": {
                "description": "the model as it was",
                "latency_ratio_layers": 1.0, "latency_ratio_model": 1.0,
                "macs_ratio": 1.0, "params_ratio": 1.0, "metric": metric,
            }
        }  # fmt: skip
        for name, c in decision.baselines.items():
            baselines[name] = {"description": _uniform_text(c)} | self.measured(
                c, metric | {"compressed": metrics.get(name), "retrained": after.get(name)}
            )
        measured = self.measured(
            chosen, metric | {"compressed": metrics.get(key), "retrained": after.get(key)}
        )
        measured["met_budget"] = chosen.feasible if met is None else met
        return Plan(
            model={
                "name": type(p.model).__name__,
                "fingerprint": model_fingerprint(p.model),
                "params": self.params,
                "macs": self.macs,
            },
            layers={ly.name: LayerPlan.of(ly, chosen.choices[ly.name]) for ly in p.layers},
            task=s.task,
            workload=describe_workloads(p.workloads),
            environment=p.environment,
            budget={"value": s.budget, "scope": s.budget_scope, "max_drop": s.max_drop},
            predicted={
                "latency_ms": None if ratio is None else dense.fixed_ms + ratio * span,
                "latency_ratio_layers": ratio,
                "score_increase": engine.predicted_loss(chosen.choices),
            },
            measured=measured,
            baselines=baselines,
            search=self.evidence(decision)
            | {"verdict": self.verdict(decision, t, metrics, after)},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def measured(self, c: Contender, metric: dict[str, Any]) -> dict[str, Any]:
        """What was measured of a contender (plan.json, "measured")."""
        t = c.timing
        macs, params = size_ratios(self.prepared.layers, c.choices, self.params, self.macs)
        return {
            "dense_latency_ms": t.dense_ms,
            "fixed_latency_ms": t.fixed_ms,
            "latency_ms": {
                "median": t.median_ms, "p10": t.p10_ms, "p90": t.p90_ms,
                "ci95": list(t.ci95_ms), "runs": t.runs,
            },
            "latency_ratio_layers": t.ratio_layers,
            "latency_ratio_layers_ci95": list(t.ratio_layers_ci95),
            "latency_ratio_model": t.ratio_model,
            "latency_ratio_model_ci95": list(t.ratio_model_ci95),
            "macs_ratio": macs,
            "params_ratio": params,
            "metric": metric,
        }  # fmt: skip

    def evidence(self, decision: Decision) -> dict[str, Any]:
        """How the search went: gap, trials, additivity, prediction errors (plan.json)."""
        known = [(q.predicted_loss, q.loss) for q in self.engine.points if q.loss]
        additivity: dict[str, Any] = {}
        if len(known) >= 5:
            predicted, true = np.array(known).T
            rank = float(spearmanr(predicted, true).statistic)
            additivity = {
                "plans": len(known),
                "rank_correlation": None if np.isnan(rank) else rank,
                "slope": float((predicted * true).sum() / max((predicted**2).sum(), 1e-12)),
            }
        first = [r for r in self.engine.rounds if r["plan"] != "dense"]
        pairs = [
            (float(str(r["predicted_ratio"])), float(str(r["measured_ratio"]))) for r in first
        ]
        return {
            "optimality_gap": self.engine.gap,
            "solver": "HiGHS branch and bound (scipy.optimize.milp)",
            "trials": decision.trials,
            "seed": self.settings.seed,
            "seconds": dict(self.pipeline.seconds),
            "peak_memory_mb": round(peak_memory_mb(self.prepared.device), 1),
            "correction": self.engine.latency.correction,
            "target_layer_ratio": decision.target,
            "rounds": self.engine.rounds,
            "latency_error": dict(error_statistics(pairs)),
            "additivity": additivity,
        }

    def verdict(
        self, decision: Decision, t: Timing, metrics: dict[str, float], after: dict[str, float]
    ) -> str:
        """One or two plain sentences."""
        winner = decision.winner
        if winner.all_dense:
            return "Keep this model dense: no plan within the budgets is faster on this device."
        text = f"The plan came from the {winner.name} stage."
        if winner.name.startswith("uniform"):
            text = f"No searched plan beat the {winner.name} plan, so that plan was taken."
        values = after or metrics
        better = self.prepared.task.metric[1]
        lost = [
            name.replace("_", " ")
            for name in decision.baselines
            if name in values and "searched" in values
            and (values[name] - values["searched"]) * (1 if better else -1) > 0
        ]  # fmt: skip
        if lost:
            text += f" Its metric is below that of {' and '.join(lost)}: a loss, shown as such."
        return text


def write_front(folder: Path, points: list[FrontPoint]) -> None:
    """front.csv: every evaluated plan, and whether it is on the front."""
    front = {id(point) for point in pareto(points)}
    rows = [
        dict(
            zip(
                FrontPoint.FIELDS,
                (
                    q.name,
                    "" if q.latency_measured else f"{q.latency_ratio:.5f}",
                    f"{q.latency_ratio:.5f}" if q.latency_measured else "",
                    f"{q.predicted_loss:.6g}",
                    "" if q.loss is None else f"{q.loss:.6g}",
                    int(id(q) in front),
                ),
                strict=True,
            )
        )
        for q in points
    ]
    write_rows(folder / "front.csv", FrontPoint.FIELDS, rows)


def _holds(folder: Path, contender: Contender) -> bool:
    """Whether a model folder holds this contender's weights."""
    return (folder / "plan.json").is_file() and Plan.load(folder).choices == contender.choices


def _blank() -> Plan:
    return Plan(model={}, layers={})


def _uniform_text(contender: Contender) -> str:
    """What a uniform plan is, in words."""
    kinds = sorted({(c.num_blocks, c.rank) for c in contender.choices.values() if c != DENSE})
    blocks = sorted({b for b, _ in kinds})
    ranks = [r for _, r in kinds]
    dense = sum(c == DENSE for c in contender.choices.values())
    text = f"b = {', '.join(map(str, blocks))}, one parameter fraction, ranks {min(ranks)}"
    text += f" to {max(ranks)}" if max(ranks) > min(ranks) else ""
    return text + (f", {dense} layers dense" if dense else "")
