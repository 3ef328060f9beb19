"""Tables in, choices out: the multiple-choice knapsack, exactly (no torch, no model).

    choose one option per layer:   min sum loss   subject to   sum cost <= budget

Greedy and black-box searches over all layers are measurably worse than this (a per-layer TPE or
NSGA-II does not even reach the best uniform plan), so every per-layer choice is made here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from blast_search.errors import InfeasibleBudgetError
from blast_search.space import Candidate
from blast_search.tables import Option

GAP = 1e-4  # relative; far below the accuracy of the scores


@dataclass(frozen=True)
class Solution:
    """Choices with their predicted cost and loss; `gap` is the proven optimality gap."""

    choices: dict[str, Candidate]
    cost_us: float
    loss: float
    gap: float


def cheapest(options: Mapping[str, list[Option]]) -> float:
    """The smallest total cost that any plan reaches, in microseconds."""
    return sum(min(o.cost_us for o in choices) for choices in options.values())


def solve(
    options: Mapping[str, list[Option]],
    budget_us: float,
    weights: Mapping[str, float] | None = None,
    time_limit_s: float = 60.0,
) -> Solution:
    """The plan of least summed loss within the budget (HiGHS branch and bound).

    Args:
        options: per layer, at least one option.
        weights: factors on the layers' losses (1 where missing).

    Raises:
        InfeasibleBudgetError: even the cheapest options exceed the budget.
    """
    minimum = cheapest(options)
    if minimum > budget_us:
        raise InfeasibleBudgetError(
            f"the cheapest plan takes {minimum:.1f} us, the budget is {budget_us:.1f} us."
        )
    flat = [(name, option) for name, choices in options.items() for option in choices]
    rows = {name: row for row, name in enumerate(options)}
    loss = np.array([o.loss * (weights or {}).get(name, 1.0) for name, o in flat])
    cost = np.array([o.cost_us for _, o in flat])
    one_each = csr_array(
        (np.ones(len(flat)), ([rows[name] for name, _ in flat], np.arange(len(flat)))),
        shape=(len(rows), len(flat)),
    )
    scale = loss.max() or 1.0  # HiGHS works with absolute tolerances
    with _silent_stdout():
        result = milp(
            loss / scale,
            integrality=np.ones(len(flat), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(cost[None, :] / budget_us, -np.inf, 1),
            ],
            options={"mip_rel_gap": GAP, "time_limit": time_limit_s},
        )
    if result.x is None:  # a feasible plan exists: the time limit struck before HiGHS found one
        chosen = {name: min(choices, key=lambda o: o.cost_us) for name, choices in options.items()}
        gap = float("inf")
    else:
        chosen = {name: o for (name, o), x in zip(flat, result.x, strict=True) if x > 0.5}
        gap = float(result.mip_gap or 0.0)
    return Solution(
        {name: option.candidate for name, option in chosen.items()},
        sum(o.cost_us for o in chosen.values()),
        sum(o.loss for o in chosen.values()),
        gap,
    )


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
