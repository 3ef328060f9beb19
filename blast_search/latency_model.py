"""Whole-model latency of a plan, predicted from cells and corrected by measurement.

    layer ratio = correction * sum of cells / sum of dense cells

Cells are timed alone, with warm caches; inside a model the same layers take somewhat more or
less.  The correction is fitted to measured whole models of the same kind of plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from blast_search.plan import Choices
from blast_search.space import DENSE, Candidate, LayerSpec
from blast_search.tables import LatencyTable


@dataclass
class LatencyModel:
    """Predicts the layer latency ratio of any plan, also at ranks between measured ones."""

    layers: Sequence[LayerSpec]
    table: LatencyTable
    correction: float = 1.0
    _costs: dict[str, dict[Candidate, float]] = field(default_factory=dict)

    def costs(self, name: str) -> dict[Candidate, float]:
        if not self._costs:
            self._costs = {layer.name: self.table.costs(layer) for layer in self.layers}
        return self._costs[name]

    @property
    def dense_us(self) -> float:
        return sum(self.costs(layer.name)[DENSE] for layer in self.layers)

    def ratio(self, choices: Choices, correction: float | None = None) -> float | None:
        """Corrected layer latency ratio; None if a block count of the plan was never measured."""
        parts = [self._cost(layer.name, choices.get(layer.name, DENSE)) for layer in self.layers]
        if any(part is None for part in parts):
            return None
        total = sum(part for part in parts if part is not None)
        return (self.correction if correction is None else correction) * total / self.dense_us

    def _cost(self, name: str, candidate: Candidate) -> float | None:
        costs = self.costs(name)
        if candidate in costs:
            return costs[candidate]
        b = candidate.num_blocks
        points = sorted((c.rank, cost) for c, cost in costs.items() if c.num_blocks == b)
        if not points:
            return None
        ranks, values = zip(*points, strict=True)
        return float(np.interp(candidate.rank, ranks, values))


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
