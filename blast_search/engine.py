"""The search proper: plans are solved for, built, measured and corrected until budgets hold.

`Engine` holds the tables and the dense model of one run.  Every whole-model measurement goes
through the run folder (`RunFolder.once`), so a resumed run repeats none of them and, given the
same numbers, takes the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from torch import nn

from blast_search import solver
from blast_search.batches import spread
from blast_search.deadline import FOREVER, Deadline
from blast_search.errors import InfeasibleBudgetError
from blast_search.fitting import Fitter
from blast_search.hull import Front
from blast_search.judge import Question
from blast_search.latency_model import LatencyModel
from blast_search.layers import Workload
from blast_search.model_latency import Timing, time_variants, untrained
from blast_search.panel import Panel
from blast_search.plan import Choices, FrontPoint
from blast_search.progress import Reporter
from blast_search.runfolder import RunFolder, digest
from blast_search.sensitivity import Scorer
from blast_search.settings import layer_target
from blast_search.space import DENSE, Candidate, LayerSpec, SearchSpace, ties_of
from blast_search.tables import Option, ScoreTable, corrected, layer_options
from blast_search.tangent import Tangent

AIM = 0.975  # of the budget: room for the noise of the final measurement
EXACT = 0.9999  # where nothing is noisy: multiply-adds, parameters


@dataclass(frozen=True)
class Contender:
    """A plan that was built and timed."""

    name: str
    choices: Choices
    timing: Timing
    ratio: float  # measured cost of the layers relative to dense, in the budget's scope
    feasible: bool

    @property
    def all_dense(self) -> bool:
        return all(c.is_dense for c in self.choices.values())


@dataclass
class Engine:
    """One run's model, tables and measurements."""

    model: nn.Module
    layers: list[LayerSpec]
    space: SearchSpace
    workloads: Sequence[Workload]
    panel: Panel
    latency: LatencyModel
    scorer: Scorer
    scores: ScoreTable
    run: RunFolder
    report: Reporter
    scope: str = "layers"
    mode: str = "eager"
    deadline: Deadline = FOREVER  # of the search: what is optional ends there
    points: list[FrontPoint] = field(default_factory=list)
    rounds: list[dict[str, object]] = field(default_factory=list)
    additivity: dict[str, Any] = field(default_factory=dict)  # see additivity.py
    tuning: dict[str, Any] = field(default_factory=dict)  # see trials.py
    gap: float = 0.0
    outside: float = 0.0  # see layer_target; 0 in the scope "layers"
    steered: bool = False  # values do change the time (model_latency.steered)
    _options: dict[object, dict[str, list[Option]]] = field(default_factory=dict)

    @property
    def fitter(self) -> Fitter:
        return self.panel.judge.fitter

    # ---- measurements -------------------------------------------------------------------

    def time(self, name: str, contenders: Mapping[str, Choices], seconds: float) -> list[Timing]:
        """Time plans side by side with dense (random factors: values do not change the time)."""

        def built(plan: Choices) -> dict[str, nn.Module]:
            if self.steered:
                return self.fitter.modules({n: c for n, c in plan.items() if not c.is_dense})
            return untrained(self.model, self.layers, plan)

        def measure() -> list[dict[str, object]]:
            variants = {key: built(plan) for key, plan in contenders.items()}
            where = self.model, self.layers, variants, self.workloads, seconds
            timings = time_variants(*where, mode=self.mode)
            return [asdict(timings[key]) for key in contenders]

        key = "+".join(digest(choices) for choices in contenders.values())
        kind = f"timing {seconds:g}s"
        return [_timing(value) for value in self.run.once(kind, key, name, measure)]

    def judged(
        self,
        name: str,
        plans: Sequence[Choices],
        count: int | None = None,
        bar: Sequence[float] = (),
        deadline: Deadline = FOREVER,
        advance: Callable[[], None] = lambda: None,
    ) -> list[list[float] | None]:
        """Divergence of each plan's model from the dense one, batch by batch of `self.order`.

        Args:
            count: how many calibration batches; None: all.
            bar: losses to beat; a plan that is far above them is given up (Judge.losses).
            deadline: once it has passed, plans are not judged any more: None.
            advance: called for every plan.
        """
        order = tuple(self.order[:count])
        kind = "loss" if len(order) == len(self.order) else f"loss on {len(order)} batches"
        part = "loss or its start" if bar else kind

        def found(key: str) -> list[float] | None:
            losses = self.run.measured.get(("loss", key)) or self.run.measured.get((part, key))
            return list(losses[: len(order)]) if losses else None

        keys = [digest(choices) for choices in plans]
        new = {key: q for key, q in zip(keys, plans, strict=True) if not found(key)}
        asked = list(new)

        def record(index: int, losses: list[float]) -> None:
            key = asked[index]
            self.run.once(part, key, name, lambda: losses)
            if len(losses) == len(self.order):
                self.run.once("loss", key, name, lambda: losses)
            advance()

        for _ in range(len(plans) - len(new)):
            advance()
        questions = [Question(choices, order, tuple(bar)) for choices in new.values()]
        self.panel.ask(questions, record, deadline)
        return [found(key) for key in keys]

    def losses(self, name: str, choices: Choices, count: int | None = None) -> list[float]:
        """As `judged`, of one plan, whatever the time."""
        (losses,) = self.judged(name, [choices], count)
        assert losses is not None
        return losses

    @property
    def order(self) -> list[int]:
        """The calibration batches so that the first few stand for all."""
        return spread(len(self.panel.judge.batches))

    def true_loss(self, name: str, choices: Choices) -> float:
        """Divergence of the built model from the dense one, mean over all calibration batches."""
        return fmean(self.losses(name, choices))

    def note_point(self, name: str, choices: Choices, loss: float) -> None:
        self.points.append(self.front_point(name, loss, choices))

    def front_point(self, name: str, loss: float, choices: Choices) -> FrontPoint:
        ratio = self.latency.ratio(choices)
        assert ratio is not None, "every plan is made of measured block counts"
        return FrontPoint(name, ratio, False, self.predicted_loss(choices), loss, choices)

    def settled_points(self, searched: Contender, others: Sequence[Contender]) -> list[FrontPoint]:
        """The evaluated plans, "searched" first, with their latency as it is finally known.

        Measured where the final timing has the plan, else by the table as it was last corrected.
        """
        timed = {digest(c.choices): self.latency_ratio(c.timing) for c in (*others, searched)}
        loss = self.true_loss("searched", searched.choices)
        noted = [(q.name, q.loss, q.choices) for q in self.points]
        points = []
        for name, value, choices in [("searched", loss, searched.choices), *noted]:
            point, ratio = self.front_point(name, value, choices), timed.get(digest(choices))
            if ratio is not None:
                point = replace(point, latency_ratio=ratio, latency_measured=True)
            points.append(point)
        return points

    def predicted_loss(self, choices: Choices) -> float:
        by_name = {layer.name: layer for layer in self.layers}
        return sum(self.scorer.score(by_name[name], c).loss for name, c in choices.items())

    # ---- plans --------------------------------------------------------------------------

    def size(self, layer: LayerSpec, candidate: Candidate) -> float:
        """What the scopes "macs" and "params" count."""
        return layer.macs(candidate) if self.scope == "macs" else layer.params(candidate)

    @property
    def by_time(self) -> bool:
        return self.scope in ("layers", "model")

    @property
    def aim(self) -> float:
        """The share of a budget that plans are solved for."""
        return AIM if self.by_time else EXACT

    def predicted_ratio(self, choices: Choices) -> float | None:
        """The layers' cost under a plan relative to dense: time, or MACs or parameters."""
        ratio = self.latency.ratio(choices)
        if self.by_time or ratio is None:  # None: a block count of which no cell could be timed
            return ratio
        cost = sum(self.size(ly, choices.get(ly.name, DENSE)) for ly in self.layers)
        return cost / self.dense_cost

    def measured_ratio(self, choices: Choices, timing: Timing) -> float:
        """As `predicted_ratio`, but the time is the measured one; MACs and parameters are exact.

        In the scope "model" it comes from the whole model's measured time: it is at most the
        target just where the model is within its budget.  An all-dense plan is the dense model.
        """
        if all(c.is_dense for c in choices.values()):
            return 1.0
        if self.scope == "model":
            return layer_target(timing.ratio_model, self.outside)
        if self.by_time:
            return self.latency_ratio(timing)
        ratio = self.predicted_ratio(choices)
        assert ratio is not None
        return ratio

    def latency_ratio(self, timing: Timing) -> float:
        """The layers' measured ratio; of the worst workload, where a budget holds on each."""
        return timing.worst if self.latency.workloads else timing.ratio_layers

    def options(self) -> dict[str, list[Option]]:
        """What the solver may choose; never a candidate that is slower than dense."""
        latency = self.latency
        key = (latency.changes, latency.correction, tuple(latency.factors.items()))
        if key not in self._options:  # at every solve, and most times nothing has changed
            options = layer_options(self.layers, latency.costs, self.scores)
            if self.by_time:
                options = corrected(options, latency.factor)
            else:
                options = {
                    ly.name: [
                        replace(o, cost_us=self.size(ly, o.candidate)) for o in options[ly.name]
                    ]
                    for ly in self.layers
                }
            self._options = {key: options}
        return dict(self._options[key])

    @property
    def dense_cost(self) -> float:
        """What all searched layers cost dense, in the unit of `options`."""
        if self.by_time:
            return self.latency.dense_us
        return sum(self.size(layer, DENSE) for layer in self.layers)

    def exact(
        self, ratio: float, weights: Mapping[str, float] | None = None, gap: float = solver.GAP
    ) -> Choices:
        """The plan of least predicted loss whose predicted layer ratio is at most `ratio`."""
        if self.space.uniform:
            return self.best_uniform(ratio, self.space.num_blocks)
        solution = self.solve(self.options(), ratio, weights, gap)
        if gap <= solver.GAP:  # trials are solved less tightly
            self.gap = max(self.gap, solution.gap)
        return solution.choices

    def solve(
        self,
        options: Mapping[str, Sequence[Option]],
        ratio: float,
        weights: Mapping[str, float] | None = None,
        gap: float = solver.GAP,
    ) -> solver.Solution:
        """The best of `options` within a predicted layer ratio; ties and all workloads kept."""
        return solver.solve(
            options, ratio * self.dense_cost, weights, ties=ties_of(self.layers),
            limits=self.latency.limits(ratio), gap=gap,
        )  # fmt: skip

    def tangent(self, plan: Choices, loss: float, deadline: Deadline = FOREVER) -> Tangent:
        """How the true loss changes around a plan (RuntimeError: not differentiable)."""
        return Tangent.at(self, plan, loss, deadline)

    def front(self, weights: Mapping[str, float] | None = None) -> Front:
        """The convex hull of all plans, by predicted cost and loss."""
        return solver.front(self.options(), weights, ties_of(self.layers))

    def fastest(self) -> Choices:
        """The plan of least predicted ratio, whatever it loses; all dense where none is faster."""
        if self.space.uniform:
            plan = self.fastest_uniform(self.space.num_blocks) or self.dense
            return plan if (self.predicted_ratio(plan) or 0.0) < 1 else self.dense
        if self.latency.workloads:
            return solver.least(self.exact)[1]
        return self.front().choices(0)

    def uniform(self, num_blocks: int, keep: float) -> dict[str, Candidate]:
        return {ly.name: self.space.uniform_choice(ly, num_blocks, keep) for ly in self.layers}

    def largest_uniform(self, num_blocks: int, ratio: float) -> dict[str, Candidate]:
        """The uniform plan of this b that keeps most parameters within a predicted ratio."""
        for keep in self.space.fractions():
            choices = self.latency.worthwhile(self.uniform(num_blocks, keep))
            predicted = self.predicted_ratio(choices)
            if predicted is not None and predicted <= ratio:
                return choices
        raise InfeasibleBudgetError(
            f"no uniform plan with {num_blocks} blocks has a layer latency ratio of {ratio:.3f}."
        )

    def best_uniform(self, ratio: float, block_counts: Sequence[int]) -> dict[str, Candidate]:
        """Over block counts, the largest uniform plan with the least predicted loss."""
        found = []
        for b in block_counts:
            try:
                choices = self.largest_uniform(b, ratio)
            except InfeasibleBudgetError:
                continue
            if not all(c.is_dense for c in choices.values()):
                found.append((self.predicted_loss(choices), b, choices))
        if not found:
            raise InfeasibleBudgetError(f"no uniform plan reaches a ratio of {ratio:.3f}.")
        return min(found, key=lambda item: item[:2])[2]

    def fastest_uniform(self, block_counts: Sequence[int]) -> Choices | None:
        """The uniform plan of least predicted cost over block counts and `keep`."""
        plans = [self.uniform(b, keep) for b in block_counts for keep in self.space.keep]
        known = [(ratio, p) for p in plans if (ratio := self.predicted_ratio(p)) is not None]
        return min(known, key=lambda item: item[0])[1] if known else None

    @property
    def dense(self) -> Choices:
        return {layer.name: DENSE for layer in self.layers}


def _timing(value: Mapping[str, object]) -> Timing:
    return Timing(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})  # type: ignore[arg-type]
