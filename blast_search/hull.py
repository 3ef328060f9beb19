"""The solver's problem as arrays, and the convex hull of all its plans.

A group is one decision: a layer, or the layers of a tie.  On the convex hull lie the plans that
are optimal for some price of latency (loss per microsecond); sorting every group's own hull steps
by price gives them all (a Lagrangian sweep without a loop over prices).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from blast_search.errors import IncompatibleInputError
from blast_search.space import Candidate
from blast_search.tables import Option

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Limit:
    """One more constraint: usage(layer, candidate), summed over all layers, is at most `limit`."""

    name: str
    usage: Callable[[str, Candidate], float]
    limit: float


@dataclass(frozen=True)
class Group:
    """Layers that share one choice.

    Arrays are sums over the layers; the last axis is the candidate.
    """

    names: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    loss: Floats  # weighted: what is minimised
    plain: Floats  # the loss without weights
    usage: Floats  # (1 + limits, candidates); the first row is the cost in microseconds

    def take(self, index: NDArray[np.int64]) -> Group:
        candidates = tuple(self.candidates[k] for k in index)
        return Group(
            self.names, candidates, self.loss[index], self.plain[index], self.usage[:, index]
        )


def grouped(
    options: Mapping[str, Sequence[Option]],
    weights: Mapping[str, float] | None = None,
    ties: Mapping[str, str] | None = None,
    limits: Sequence[Limit] = (),
) -> list[Group]:
    """One group per layer or tie, cheapest option first, dominated options left out.

    Raises:
        IncompatibleInputError: tied layers without a common candidate.
    """
    weights, ties = weights or {}, ties or {}
    members: dict[tuple[bool, str], list[str]] = {}
    for name in options:
        tie = ties.get(name)
        members.setdefault((bool(tie), tie or name), []).append(name)
    groups = []
    for names in members.values():
        found = _aligned(names, [options[name] for name in names])
        candidates = tuple(o.candidate for o in found[0])
        losses = np.array([[o.loss for o in choices] for choices in found])
        rows = [np.sum([[o.cost_us for o in choices] for choices in found], axis=0)]
        rows += [np.array([sum(x.usage(n, c) for n in names) for c in candidates]) for x in limits]
        factors = np.array([weights.get(name, 1.0) for name in names])
        group = Group(
            tuple(names), candidates, factors @ losses, losses.sum(axis=0), np.array(rows)
        )
        groups.append(_undominated(group))
    return groups


def _aligned(
    names: Sequence[str], found: Sequence[Sequence[Option]]
) -> Sequence[Sequence[Option]]:
    """The options of tied layers that all of them have, in one order."""
    if len(names) == 1:
        return found
    tables = [{o.candidate: o for o in choices} for choices in found]
    common = [c for c in tables[0] if all(c in table for table in tables)]
    if not common:
        raise IncompatibleInputError(
            f"the tied layers {', '.join(names)} have no candidate in common. Untie them in the "
            "search space."
        )
    return [[table[c] for c in common] for table in tables]


def _undominated(group: Group) -> Group:
    """Without options that another one beats, or equals, in loss and in every usage."""
    values = np.vstack([group.usage, group.loss])
    order = np.lexsort(values[::-1])  # by cost, then the further rows, then loss
    values = values[:, order]
    if len(values) == 2:
        best = np.minimum.accumulate(values[1])
        return group.take(order[np.append(True, values[1][1:] < best[:-1])])
    # beats[i, j]: option i, which comes before j in the order, is nowhere worse than j.
    beats = np.triu((values[:, :, None] <= values[:, None, :]).all(axis=0), k=1)
    return group.take(order[~beats.any(axis=0)])


@dataclass(frozen=True)
class Front:
    """Plans on the convex hull, cheapest first: plan k has taken the first k steps.

    Attributes:
        cost_us, loss: (plans,); rising, and falling ever more slowly.
        steps: per step, the group it changes and the option it changes it to.
    """

    groups: Sequence[Group]
    first: NDArray[np.int64]  # (groups,), the options of plan 0
    cost_us: Floats
    loss: Floats
    steps: NDArray[np.int64]  # (plans - 1, 2)

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Front:
        steps, prices, costs, gains, first = [], [], [], [], []
        start = np.zeros(2)
        for index, group in enumerate(groups):
            cost_us, losses = group.usage[0].tolist(), group.loss.tolist()
            corners = _lower_hull(cost_us, losses)
            first.append(corners[0])
            start += cost_us[corners[0]], losses[corners[0]]
            for before, after in pairwise(corners):
                cost = cost_us[after] - cost_us[before]
                gain = losses[before] - losses[after]
                steps.append((index, after))
                prices.append(gain / cost)
                costs.append(cost)
                gains.append(gain)
        order = np.argsort(-np.array(prices), kind="stable")
        return cls(
            groups,
            np.array(first, np.int64),
            start[0] + np.append(0.0, np.cumsum(np.array(costs)[order])),
            start[1] - np.append(0.0, np.cumsum(np.array(gains)[order])),
            np.array(steps, np.int64).reshape(-1, 2)[order],
        )

    def plan(self, k: int) -> NDArray[np.int64]:
        """Per group, the index of its option in plan k."""
        picks = self.first.copy()
        for index, option in self.steps[:k]:
            picks[index] = option
        return picks

    def choices(self, k: int) -> dict[str, Candidate]:
        return {
            name: group.candidates[pick]
            for group, pick in zip(self.groups, self.plan(k), strict=True)
            for name in group.names
        }

    def within(self, budget_us: float) -> int:
        """The dearest plan within a budget (0 where none is)."""
        return max(0, int(np.searchsorted(self.cost_us, budget_us, side="right")) - 1)

    def price(self, budget_us: float) -> float:
        """Weighted loss per microsecond that the next step beyond a budget gains (0: none)."""
        k = self.within(budget_us)
        if k + 1 >= len(self.cost_us):
            return 0.0
        return float((self.loss[k] - self.loss[k + 1]) / (self.cost_us[k + 1] - self.cost_us[k]))

    def start(self, budget_us: float) -> tuple[NDArray[np.int64], float, float]:
        """A good plan within the budget, a lower bound on every plan's loss, and the price.

        The plan is the hull's, with what is left of the budget spent on later steps that fit.
        The bound is the Lagrangian dual's optimum: the hull, linear between its plans.
        """
        k, price = self.within(budget_us), self.price(budget_us)
        picks, left = self.plan(k), budget_us - float(self.cost_us[k])
        for index, option in self.steps[k:]:
            group = self.groups[index]
            extra = group.usage[0][option] - group.usage[0][picks[index]]
            if extra <= left and group.loss[option] < group.loss[picks[index]]:
                picks[index] = option
                left -= extra
        return picks, float(self.loss[k]) - price * max(0.0, budget_us - self.cost_us[k]), price


def _lower_hull(cost: Sequence[float], loss: Sequence[float]) -> list[int]:
    """Corners of the lower convex hull of points sorted by cost, as far as the loss falls."""
    corners: list[int] = []
    for k in range(len(cost)):
        if corners and loss[k] >= loss[corners[-1]]:
            continue
        if corners and cost[k] == cost[corners[-1]]:
            corners.pop()
        while len(corners) > 1:
            a, b = corners[-2:]
            ahead, back = cost[k] - cost[b], cost[b] - cost[a]
            if (loss[a] - loss[b]) * ahead > (loss[b] - loss[k]) * back:
                break
            corners.pop()
        corners.append(k)
    return corners
