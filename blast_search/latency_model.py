"""Whole-model latency of a plan, predicted from cells and corrected by measurement.

    layer ratio = (cells left dense + correction * cells replaced) / all cells dense

Cells are timed alone, with warm caches; inside a model, replaced layers take somewhat more or
less beside dense ones.  The correction is fitted to measured whole models of one kind of plan.
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
        parts = self.parts(choices)
        if parts is None:
            return None
        return parts[0] + (self.correction if correction is None else correction) * parts[1]

    def parts(self, choices: Choices) -> tuple[float, float] | None:
        """Uncorrected shares of the dense time: of layers left dense, of replaced layers."""
        kept = replaced = 0.0
        for layer in self.layers:
            candidate = choices.get(layer.name, DENSE)
            cost = self._cost(layer.name, candidate)
            if cost is None:
                return None
            if candidate.is_dense:
                kept += cost
            else:
                replaced += cost
        return kept / self.dense_us, replaced / self.dense_us

    def factor(self, choices: Choices, measured: float) -> float:
        """The correction that would have predicted a measured ratio exactly."""
        kept, replaced = self.parts(choices) or (0.0, 1.0)
        return (measured - kept) / replaced if replaced > 0 else 1.0

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
