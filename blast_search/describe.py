"""What is known of a decision, as the JSON values of plan.json and the rows of front.csv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blast_search.apply import model_fingerprint
from blast_search.engine import Contender, Engine
from blast_search.evaluate import describe_workloads, size_ratios
from blast_search.files import write_rows
from blast_search.filling import FILLED
from blast_search.last_timing import FASTEST, Decision
from blast_search.latency_model import error_statistics
from blast_search.model_latency import Timing
from blast_search.noise import table_noise
from blast_search.plan import FrontPoint, LayerPlan, Plan, pareto
from blast_search.price import price
from blast_search.space import DENSE

if TYPE_CHECKING:
    from blast_search.pipeline import Pipeline

DENSE_KEY = "dense"  # the dense model among the contenders, where the budget allows it
LITTLE = 0.05  # what the trials take off the true loss: less than this is called little


@dataclass(frozen=True)
class Describer:
    """Turns contenders of one run into plans with their evidence."""

    pipeline: Pipeline
    engine: Engine
    params: int
    macs: float

    def plan(
        self,
        decision: Decision,
        contender: Contender | None = None,
        metrics: Mapping[str, float] | None = None,
        after: Mapping[str, float] | None = None,
        met: bool | None = None,
    ) -> Plan:
        """The plan of a contender (default: the winner) with all that is known of it."""
        p, s, engine = self.pipeline.prepared, self.pipeline.settings, self.engine
        metrics, after = metrics or {}, after or {}
        chosen = contender or decision.winner
        # What is neither the winner nor a baseline is the dense model, which the budget allows.
        other = "searched" if chosen is decision.winner else DENSE_KEY
        key = next((k for k, c in decision.baselines.items() if c is chosen), other)
        dense = decision.dense
        span = dense.dense_ms - dense.fixed_ms
        ratio = engine.latency.total(chosen.choices, 1.0)
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
            baselines[name] = {"description": uniform_text(c)} | self.measured(
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
            environment=p.environment | {"mode": p.mode},
            budget={"value": s.budget, "scope": s.budget_scope, "max_drop": s.max_drop}
            | ({"every_workload": engine.latency.workloads} if s.every_workload else {}),
            predicted={
                "latency_ms": None if ratio is None else dense.fixed_ms + ratio * span,
                "latency_ratio_layers": ratio,
                "score_increase": engine.predicted_loss(chosen.choices),
            },
            measured=measured,
            baselines=baselines,
            search=self.evidence(decision, chosen)
            | {"verdict": self.verdict(decision, chosen, metrics, after)},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def measured(self, c: Contender, metric: dict[str, Any]) -> dict[str, Any]:
        """What was measured of a contender (plan.json, "measured")."""
        t = c.timing
        macs, params = size_ratios(
            self.pipeline.prepared.layers, c.choices, self.params, self.macs
        )
        return {
            "dense_latency_ms": t.dense_ms,
            "fixed_latency_ms": t.fixed_ms,
            "latency_ms": {
                "median": t.median_ms, "p10": t.p10_ms, "p90": t.p90_ms,
                "ci95": list(t.ci95_ms), "runs": t.runs,
            },
            "latency_ratio_layers": t.ratio_layers,
            "latency_ratio_layers_ci95": list(t.ratio_layers_ci95),
            "latency_ratio_layers_by_workload": self.by_workload(t),
            "latency_ratio_model": t.ratio_model,
            "latency_ratio_model_ci95": list(t.ratio_model_ci95),
            "macs_ratio": macs,
            "params_ratio": params,
            "metric": metric,
        }  # fmt: skip

    def points(self, decision: Decision) -> list[FrontPoint]:
        """Every evaluated plan, with the sizes of its whole model."""
        layers = self.pipeline.prepared.layers
        others = list(decision.baselines.values())
        points = []
        for point in self.engine.settled_points(decision.winner, others):
            macs, params = size_ratios(layers, point.choices, self.params, self.macs)
            points.append(replace(point, macs_ratio=macs, params_ratio=params))
        return points

    def by_workload(self, timing: Timing) -> dict[str, float | None]:
        """Null where no searched layer takes time."""
        names = [w.name for w in self.pipeline.prepared.workloads]
        return dict(zip(names, timing.by_workload, strict=True))

    def evidence(self, decision: Decision, chosen: Contender) -> dict[str, Any]:
        """How the search went: gap, trials, additivity, prices, prediction errors (plan.json)."""
        # Of the searched plan alone: no other one was solved with them.
        weights = decision.weights if chosen is decision.winner else {}
        pairs = [
            (float(str(r["predicted_ratio"])), float(str(r["measured_ratio"])))
            for r in self.engine.rounds
        ]
        return {
            "optimality_gap": self.engine.gap,
            "solver": "HiGHS branch and bound (scipy.optimize.milp)",
            "trials": decision.trials,
            "seed": self.pipeline.settings.seed,
            "workload": self.pipeline.settings.workload,  # as asked for; None: the task's own
            "seconds": dict(self.pipeline.seconds),
            "peak_memory_mb": round(peak_memory_mb(self.pipeline.prepared.device), 1),
            "correction": self.engine.latency.correction,
            "factors": {str(b): f for b, f in self.engine.latency.factors.items()},
            "target_layer_ratio": decision.target,
            "probing": {
                "layers": len(self.engine.scorer.scales),
                "probed": self.engine.scorer.probed,
            },
            "rounds": self.engine.rounds,
            "latency_error": dict(error_statistics(pairs)),
            "latency_check": self.pipeline.latency_check,
            "timing_noise": self.noise(),
            "additivity": self.engine.additivity,
            "optuna": self.engine.tuning,
            "price": price(self.engine, chosen, weights),
        }

    def noise(self) -> dict[str, Any]:
        found = table_noise(self.engine.latency.table.cells)
        return asdict(found) | {"noisy": found.noisy, "text": found.text}

    def verdict(
        self,
        decision: Decision,
        chosen: Contender,
        metrics: Mapping[str, float],
        after: Mapping[str, float],
    ) -> str:
        """Where the plan came from, in one plain sentence."""
        if DENSE_KEY in metrics and chosen.all_dense:
            return (
                "Keep this model dense: the budget allows it, and no plan has a better "
                f"{self.pipeline.prepared.task.metric[0]}. A smaller --budget, or --max-drop "
                "alone, asks for a faster model."
            )
        if chosen.all_dense:
            return "Keep this model dense: no plan within the budgets is faster on this device."
        when, values = ("after", after) if after else ("before", metrics)
        other = decision.winner.choices != chosen.choices
        known = other and "searched" in values  # else it is the uniform plan's own number
        found = f", {when} retraining {values['searched']:.4g}," if known else ""
        if chosen.name.startswith("uniform"):
            return f"No searched plan{found} beat the {chosen.name} plan, so that one was taken."
        if chosen.name.startswith(FILLED):
            return (
                f"No searched plan{found} beat the {chosen.name.removeprefix(FILLED).strip()} "
                "plan; what that one left of the budget went to single layers, which was better "
                "still."
            )
        if chosen.name == FASTEST:
            return (
                "The fastest plan there is was taken: neither the exact nor a searched plan held "
                "the budget as measured."
            )
        return f"The plan came from the {chosen.name} stage of the search. {self.trials_paid()}"

    def trials_paid(self) -> str:
        """What the trials brought over the exact plan, in one plain sentence ("" without any)."""
        t = self.engine.tuning
        if not t or t["exact_loss"] is None:
            return ""
        by = t["lowered_loss_by"] or 0.0
        if by <= 0:
            return (
                f"The Optuna stage did not pay: none of its {t['trials']} trials had a lower true "
                f"loss than the exact plan ({t['exact_loss']:.4g}) at equal predicted latency."
            )
        how = next(
            how
            for key, how in (
                ("weights_loss", "by weights"),
                ("steps_loss", "a step along the gradient"),
                ("moves_loss", "a move of single layers"),
            )
            if t[key] == t["best_loss"]
        )
        return (
            f"The Optuna stage lowered the true loss by {by * 100:.1f}% against the exact plan at "
            f"equal predicted latency ({t['exact_loss']:.4g} to {t['best_loss']:.4g}, "
            f"{t['trials']} trials, the best one {how})."
            + (" That is little: --trials 0 would leave the stage out." if by < LITTLE else "")
        )


def write_front(folder: Path, points: list[FrontPoint]) -> None:
    """front.csv: every evaluated plan, whether it is on the front, and its model's sizes."""
    front = {id(point) for point in pareto(points)}
    rows = [
        dict(
            zip(
                (*FrontPoint.FIELDS, *FrontPoint.SIZES),
                (
                    q.name,
                    "" if q.latency_measured else f"{q.latency_ratio:.5f}",
                    f"{q.latency_ratio:.5f}" if q.latency_measured else "",
                    f"{q.predicted_loss:.6g}",
                    "" if q.loss is None else f"{q.loss:.6g}",
                    int(id(q) in front),
                    "" if q.macs_ratio is None else f"{q.macs_ratio:.5f}",
                    "" if q.params_ratio is None else f"{q.params_ratio:.5f}",
                ),
                strict=True,
            )
        )
        for q in points
    ]
    write_rows(folder / "front.csv", (*FrontPoint.FIELDS, *FrontPoint.SIZES), rows)


def uniform_text(contender: Contender) -> str:
    """What a uniform plan is, in words."""
    if not contender.name.startswith("uniform"):
        return f"the plan of the {contender.name}"
    kinds = sorted({(c.num_blocks, c.rank) for c in contender.choices.values() if c != DENSE})
    blocks = sorted({b for b, _ in kinds})
    ranks = [r for _, r in kinds]
    dense = sum(c == DENSE for c in contender.choices.values())
    text = f"b = {', '.join(map(str, blocks))}, one parameter fraction, ranks {min(ranks)}"
    text += f" to {max(ranks)}" if max(ranks) > min(ranks) else ""
    return text + (f", {dense} layers dense" if dense else "")


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process so far: GPU memory on CUDA, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
