"""Tables in, choices out: the multiple-choice knapsack, exactly (no torch, no model).

    choose one option per layer:   min sum loss   subject to   sum cost <= budget
                                                  and to further limits (memory, a workload, ...)

Layers that are tied take one option together.  Greedy and black-box searches over all layers are
measurably worse than this (a per-layer TPE or NSGA-II does not even reach the best uniform plan),
so every per-layer choice is made here.

The convex hull of all plans (hull.py; under several limits, the linear relaxation) gives a first
plan, prices and a lower bound at once; options whose reduced cost shows that no better plan can
hold them are dropped, and HiGHS proves the rest.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

from blast_search.errors import BlastSearchError, InfeasibleBudgetError
from blast_search.hull import Floats, Front, Group, Limit, grouped
from blast_search.space import Candidate
from blast_search.tables import Option

GAP = 1e-4  # relative; far below the accuracy of the scores
TOLERANCE = 1e-9  # relative: sums of many floats may exceed a limit by rounding
STEP = 1e-3  # of a ratio
T = TypeVar("T")
Picks = NDArray[np.int64]  # per group, the index of its option


@dataclass(frozen=True)
class Solution:
    """Choices with their predicted cost and loss (unweighted).

    `gap`: by how much of its weighted loss the plan may be above the optimum at most; proven.
    """

    choices: dict[str, Candidate]
    cost_us: float
    loss: float
    gap: float


def least(solve: Callable[[float], T]) -> tuple[float, T]:
    """The smallest ratio (up to STEP above it) for which `solve` has a plan, and that plan.

    For kinds of plans of which no sum says what the cheapest one is: uniform ones, and those under
    budgets that hold on several workloads.

    Args:
        solve: raises InfeasibleBudgetError for a ratio below; 1.0 is possible.
    """
    low, high, best = 0.0, 1.0, solve(1.0)
    while high - low > STEP:
        middle = (low + high) / 2
        try:
            best, high = solve(middle), middle
        except InfeasibleBudgetError:
            low = middle
    return high, best


def front(
    options: Mapping[str, Sequence[Option]],
    weights: Mapping[str, float] | None = None,
    ties: Mapping[str, str] | None = None,
) -> Front:
    """All plans on the convex hull of (cost, weighted loss), in milliseconds."""
    return Front.of(grouped(options, weights, ties))


def solve(
    options: Mapping[str, Sequence[Option]],
    budget_us: float,
    weights: Mapping[str, float] | None = None,
    time_limit_s: float = 60.0,
    *,
    ties: Mapping[str, str] | None = None,
    limits: Sequence[Limit] = (),
    gap: float = GAP,
) -> Solution:
    """The plan of least summed loss within the budget and all limits.

    Args:
        options: per layer, at least one option.
        weights: factors on the layers' losses (1 where missing).
        time_limit_s: after this the best plan so far is returned, with its gap.
        ties: layer -> name of its tie; layers of one tie take the same candidate.
        limits: further constraints.
        gap: stop at this relative optimality gap.

    Raises:
        InfeasibleBudgetError: no plan meets the budget and all limits.
        BlastSearchError: the time limit struck before any plan was found (several limits only).
    """
    groups = grouped(options, weights, ties, limits)
    bounds = np.array([budget_us, *(limit.limit for limit in limits)])
    _check_each(groups, bounds, limits)
    if limits:
        picks, bound, prices = _relaxed(groups, bounds)
    else:
        picks, bound, price = Front.of(groups).start(budget_us)
        prices = np.array([price])
    if len(picks) and not _within(groups, picks, bounds):
        picks = np.empty(0, np.int64)
    if len(picks):
        groups, picks, reached = _reduced(groups, picks, bound, prices, gap)
        if reached:
            return _solution(options, groups, picks, bound)
    scale = bound if bound > 0 else max(float(g.loss.max()) for g in groups) or 1.0
    found, proven = _branch_and_bound(groups, bounds, scale, time_limit_s, gap)
    if found is None and not len(picks):
        if np.isfinite(proven):
            raise BlastSearchError(
                f"no plan was found in {time_limit_s:g} s for {len(groups)} choices under "
                f"{len(bounds)} limits. Allow more time, or loosen a limit."
            )
        raise InfeasibleBudgetError(
            f"no plan meets the budget and the limits ({', '.join(x.name for x in limits)}) "
            "together, though each can be met alone."
        )
    if found is not None and (not len(picks) or _loss(groups, found) < _loss(groups, picks)):
        picks = found
    return _solution(options, groups, picks, max(bound, proven))


def _check_each(groups: Sequence[Group], bounds: Floats, limits: Sequence[Limit]) -> None:
    least = np.sum([group.usage.min(axis=1) for group in groups], axis=0)
    for row, (minimum, bound) in enumerate(zip(least, bounds, strict=True)):
        if minimum > bound * (1 + TOLERANCE):
            what = "the cheapest plan takes" if row == 0 else f"{limits[row - 1].name}: at least"
            unit = " us" if row == 0 else ""
            raise InfeasibleBudgetError(
                f"{what} {minimum:.1f}{unit}, the {'limit' if row else 'budget'} is "
                f"{bound:.1f}{unit}."
            )


def _loss(groups: Sequence[Group], picks: Picks) -> float:
    return float(sum(g.loss[k] for g, k in zip(groups, picks, strict=True)))


def _within(groups: Sequence[Group], picks: Picks, bounds: Floats) -> bool:
    used = np.sum([g.usage[:, k] for g, k in zip(groups, picks, strict=True)], axis=0)
    return bool((used <= bounds * (1 + TOLERANCE)).all())


def _solution(
    options: Mapping[str, Sequence[Option]], groups: Sequence[Group], picks: Picks, bound: float
) -> Solution:
    loss = _loss(groups, picks)
    pairs = list(zip(groups, picks, strict=True))
    chosen = {name: group.candidates[k] for group, k in pairs for name in group.names}
    return Solution(
        {name: chosen[name] for name in options},
        float(sum(group.usage[0][k] for group, k in pairs)),
        float(sum(group.plain[k] for group, k in pairs)),
        max(0.0, (loss - bound) / loss) if loss > 0 else 0.0,
    )


def _relaxed(groups: Sequence[Group], bounds: Floats) -> tuple[Picks, float, Floats]:
    """As `Front.start` under several limits: a plan, a lower bound, and a price per limit.

    The prices are the linear relaxation's (each choice a mixture), solved by HiGHS.  The bound is
    the Lagrangian at them, which holds for any prices.  The plan has the least priced loss of each
    choice; what a limit has no room for is cheapest instead, and what is left is spent on the best
    steps that fit.  It may be over a limit.
    """
    loss = np.concatenate([g.loss for g in groups])
    one_each, usage, size = _rows(groups, bounds)
    scale = float(np.abs(loss).max()) or 1.0
    with _silent_stdout():
        found = linprog(  # type: ignore[call-overload]  # the stubs know no sparse matrix
            loss / scale, usage, bounds / size, one_each, np.ones(len(groups)), method="highs"
        )
    if found.status != 0:
        return np.empty(0, np.int64), -np.inf, np.zeros(len(bounds))
    prices: Floats = np.maximum(-found.ineqlin.marginals, 0) * scale / size
    priced = [g.loss + prices @ g.usage for g in groups]
    bound = float(sum(p.min() for p in priced) - prices @ bounds)
    picks = np.array([int(p.argmin()) for p in priced], np.int64)
    parts = np.split(found.x, np.cumsum([len(g.candidates) for g in groups])[:-1])
    if not _within(groups, picks, bounds):  # only the mixed choices can be taken too dear
        for index, part in enumerate(parts):
            if part.max() < 1 - 1e-6:
                picks[index] = int((prices @ groups[index].usage).argmin())
    left = bounds - np.sum([g.usage[:, k] for g, k in zip(groups, picks, strict=True)], axis=0)
    steps = [
        (float(p[k] - p[pick]), index, k)
        for index, (p, g, pick) in enumerate(zip(priced, groups, picks, strict=True))
        for k in np.flatnonzero(g.loss < g.loss[pick])
    ]
    for _, index, k in sorted(steps):
        group = groups[index]
        extra = group.usage[:, k] - group.usage[:, picks[index]]
        if group.loss[k] < group.loss[picks[index]] and (extra <= left).all():
            picks[index] = k
            left -= extra
    return picks, bound, prices


def _rows(groups: Sequence[Group], bounds: Floats) -> tuple[csr_array, Floats, Floats]:
    """One choice per group as a matrix, the usage over each limit's size, and those sizes.

    HiGHS works with absolute tolerances: every row is brought to about 1.
    """
    sizes = [len(g.candidates) for g in groups]
    columns = sum(sizes)
    owner = np.repeat(np.arange(len(groups)), sizes)
    one_each = csr_array((np.ones(columns), (owner, np.arange(columns))))
    size = np.where(bounds != 0, np.abs(bounds), 1.0)
    return one_each, np.concatenate([g.usage for g in groups], axis=1) / size[:, None], size


def _reduced(
    groups: Sequence[Group], picks: Picks, bound: float, prices: Floats, gap: float
) -> tuple[list[Group], Picks, bool]:
    """Groups without the options that no plan better than `picks` can hold.

    With the prices that gave it, `bound` + (an option's priced loss - the least of its group)
    bounds the loss of every plan that holds the option (Lagrangian).

    Returns:
        The groups, the picks in them, and whether the gap is reached already.
    """
    best = _loss(groups, picks)
    if best - bound <= gap * best:
        return list(groups), picks, True
    kept, places = [], []
    for group, pick in zip(groups, picks, strict=True):
        priced = group.loss + prices @ group.usage
        stays = bound + (priced - priced.min()) <= best * (1 + TOLERANCE)
        stays[pick] = True
        kept.append(group.take(np.flatnonzero(stays)))
        places.append(int(stays[:pick].sum()))
    return kept, np.array(places, np.int64), False


def _branch_and_bound(
    groups: Sequence[Group],
    bounds: Floats,
    scale: float,
    time_limit_s: float,
    gap: float,
) -> tuple[Picks | None, float]:
    """HiGHS.  Returns the picks (None: none found) and the proven bound (inf: infeasible)."""
    starts = np.cumsum([0, *(len(g.candidates) for g in groups)])
    columns = int(starts[-1])
    one_each, usage, size = _rows(groups, bounds)
    loss = np.concatenate([g.loss for g in groups]) / scale
    slack, began = 0.0, time.monotonic()
    for _ in range(3):
        left = max(0.1, time_limit_s - (time.monotonic() - began))
        with _silent_stdout():
            result = milp(
                loss,
                integrality=np.ones(columns, dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(
                    vstack([one_each, csr_array(usage)]),
                    np.concatenate([np.ones(len(groups)), np.full(len(bounds), -np.inf)]),
                    np.concatenate([np.ones(len(groups)), bounds / size - slack]),
                ),
                options={"mip_rel_gap": gap, "time_limit": left},
            )
        if result.x is None:
            return None, np.inf if result.status == 2 else 0.0
        parts = np.split(result.x, starts[1:-1])
        picks = np.array([int(part.argmax()) for part in parts], np.int64)
        if _within(groups, picks, bounds):
            return picks, float(result.mip_dual_bound or 0.0) * scale
        slack += 2e-6  # its feasibility tolerance let it exceed a limit by a hair
    return None, 0.0


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """HiGHS 1.12 prints a debugging line from C++ now and then; it would break --json."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
