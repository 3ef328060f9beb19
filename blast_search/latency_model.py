"""Whole-model latency of a plan, predicted from cells and corrected by measurement.

    layer ratio = (cells left dense + correction * sum_b factor_b * cells of b blocks) / all dense
    model latency = fixed + layer ratio * (dense - fixed)

Cells are timed alone, with warm caches; inside a model, replaced layers take somewhat more or
less.  `factors` are fitted to measured random plans (plan_check.py), once per run; `correction`
to the plans of one kind that the closed loop builds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from blast_search.hull import Limit
from blast_search.plan import Choices
from blast_search.space import DENSE, Candidate, LayerSpec
from blast_search.tables import LatencyTable

RIDGE = 0.02  # pull of a factor towards 1, relative to one plan that is all of its kind
LIMITS = (0.3, 3.0)

Shares = dict[int, float]  # block count (0: left dense) -> share of the dense layers' time


@dataclass
class LatencyModel:
    """Predicts the layer latency ratio of any plan, also at ranks between measured ones.

    Attributes:
        workloads: names, where a budget holds on each of them: the ratio of a plan is then its
            largest over them.  Without names it is that of their weighted sum.
    """

    layers: Sequence[LayerSpec]
    table: LatencyTable
    correction: float = 1.0
    factors: dict[int, float] = field(default_factory=dict)
    workloads: Sequence[str] = ()
    changes: int = 0  # of the table, so far
    _costs: dict[str, dict[Candidate, float]] = field(default_factory=dict)
    _between: dict[tuple[int, Candidate], float | None] = field(default_factory=dict)

    @contextmanager
    def kept(self, correction: float | None = None) -> Iterator[None]:
        """Whatever corrects the model within it, the correction of before is put back.

        Args:
            correction: the one to begin with, instead of that of before.
        """
        before = self.correction
        self.correction = before if correction is None else correction
        try:
            yield
        finally:
            self.correction = before

    @cached_property
    def parts(self) -> tuple[LatencyModel, ...]:
        """This model for each of `workloads` alone, uncorrected; itself where there are none."""
        if not self.workloads:
            return (self,)
        return tuple(
            LatencyModel([ly for ly in map(only, self.layers) if ly.calls], self.table)
            for only in (lambda ly, w=w: _in_workload(ly, w) for w in self.workloads)
        )

    def costs(self, name: str) -> dict[Candidate, float]:
        if not self._costs:
            alike: dict[object, dict[Candidate, float]] = {}  # most layers have twins
            for layer in self.layers:
                key = (layer.shape, layer.bias, layer.calls)
                if key not in alike:
                    alike[key] = self.table.costs(layer)
                self._costs[layer.name] = alike[key]
        return self._costs[name]

    def table_changed(self) -> None:
        self._costs, self._between = {}, {}
        self.changes += 1
        self.__dict__.pop("parts", None)

    @property
    def dense_us(self) -> float:
        return sum(self.costs(layer.name)[DENSE] for layer in self.layers)

    def factor(self, candidate: Candidate) -> float:
        """What a cell's time is multiplied with; layers left dense need no correction."""
        if candidate.is_dense:
            return 1.0
        return self.correction * self.factors.get(candidate.num_blocks, 1.0)

    def ratio(self, choices: Choices, correction: float | None = None) -> float | None:
        """Corrected layer latency ratio; None if a block count of the plan was never measured."""
        ratios = [self._ratio(part, choices, correction) for part in self.parts]
        known = [ratio for ratio in ratios if ratio is not None]
        return max(known) if known and len(known) == len(ratios) else None

    def total(self, choices: Choices, correction: float | None = None) -> float | None:
        """The ratio of the weighted sum, whether or not a budget holds on each workload."""
        return self._ratio(self, choices, correction)

    def _ratio(
        self, part: LatencyModel, choices: Choices, correction: float | None
    ) -> float | None:
        shares = part.shares(choices)
        if shares is None:
            return None
        correction = self.correction if correction is None else correction
        return shares.get(0, 0.0) + correction * replaced(shares, self.factors)

    def limits(self, ratio: float) -> list[Limit]:
        """The solver's constraints for a ratio on each of `workloads`; the sum's is not here."""
        if not self.workloads:
            return []

        def usage(part: LatencyModel) -> Callable[[str, Candidate], float]:
            called = {layer.name for layer in part.layers}

            def of(name: str, candidate: Candidate) -> float:
                cost = part.cost(name, candidate) if name in called else None
                return (cost or 0.0) * self.factor(candidate)

            return of

        return [
            Limit(f"workload {name}", usage(part), ratio * part.dense_us)
            for name, part in zip(self.workloads, self.parts, strict=True)
        ]

    def shares(self, choices: Choices) -> Shares | None:
        """Uncorrected, by block count."""
        shares: Shares = {}
        dense_us = self.dense_us  # a sum over all layers
        for layer in self.layers:
            candidate = choices.get(layer.name, DENSE)
            cost = self.cost(layer.name, candidate)
            if cost is None:
                return None
            b = candidate.num_blocks
            shares[b] = shares.get(b, 0.0) + cost / dense_us
        return shares

    def asked_correction(self, choices: Choices, measured: float) -> float:
        """The correction that would have predicted a measured ratio exactly."""
        asked = []
        for part in self.parts:
            shares = part.shares(choices) or {}
            variable = replaced(shares, self.factors)
            if variable > 0:
                asked.append((measured - shares.get(0, 0.0)) / variable)
        return min(asked, default=1.0)

    def worthwhile(self, plan: Choices) -> dict[str, Candidate]:
        """A plan in which layers stay dense whose candidate is no faster on this device."""
        costs = {name: self.cost(name, candidate) for name, candidate in plan.items()}
        return {
            name: candidate if (cost := costs[name]) and cost < self.costs(name)[DENSE] else DENSE
            for name, candidate in plan.items()
        }

    def cost(self, name: str, candidate: Candidate) -> float | None:
        """A layer's time, uncorrected, linear between measured ranks; None: b never measured."""
        costs = self.costs(name)
        if candidate in costs:
            return costs[candidate]
        key = (id(costs), candidate)  # layers of one shape share theirs
        if key not in self._between:
            b = candidate.num_blocks
            points = sorted((c.rank, cost) for c, cost in costs.items() if c.num_blocks == b)
            ranks, values = zip(*points, strict=True) if points else ((), ())
            self._between[key] = (
                float(np.interp(candidate.rank, ranks, values)) if points else None
            )
        return self._between[key]


def _in_workload(layer: LayerSpec, workload: str) -> LayerSpec:
    return replace(layer, calls=tuple(c for c in layer.calls if c.workload == workload))


def replaced(shares: Shares, factors: Mapping[int, float]) -> float:
    """The share of the replaced layers, corrected by block count."""
    return sum(factors.get(b, 1.0) * share for b, share in shares.items() if b)


def fit_factors(plans: Sequence[tuple[Shares, float]]) -> dict[int, float]:
    """Factors per block count from (shares, measured layer ratio) of plans.

    Least squares of the relative errors, with a ridge towards 1: a block count that few plans
    use keeps its cells' times.
    """
    blocks = sorted({b for shares, _ in plans for b in shares if b})
    if not blocks:
        return {}
    ratios = np.array([ratio for _, ratio in plans])
    shares = np.array([[shares.get(b, 0.0) for b in (0, *blocks)] for shares, _ in plans])
    shares /= ratios[:, None]
    used, missing = shares[:, 1:], 1.0 - shares.sum(1)  # what factors of 1 leave unexplained
    normal = used.T @ used + RIDGE * np.eye(len(blocks))
    factors = 1.0 + np.linalg.solve(normal, used.T @ missing)
    return {b: float(f) for b, f in zip(blocks, np.clip(factors, *LIMITS), strict=True)}


def error_statistics(pairs: Sequence[tuple[float, float]]) -> Mapping[str, float]:
    """Median and worst relative error of (predicted, measured) pairs."""
    if not pairs:
        return {}
    errors = [abs(predicted - measured) / measured for predicted, measured in pairs]
    return {
        "plans": len(errors),
        "median": float(np.median(errors)),
        "worst": float(np.max(errors)),
        "bias": float(np.mean([(p - m) / m for p, m in pairs])),
    }
