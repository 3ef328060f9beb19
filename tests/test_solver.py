"""The exact solver against brute force, and its limits."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blast_search import solver
from blast_search.errors import InfeasibleBudgetError
from blast_search.space import DENSE, Candidate
from blast_search.tables import Option, undominated

number = st.floats(0.1, 10)
layer = st.lists(st.tuples(number, st.floats(0, 5)), min_size=1, max_size=5)


def options_of(layers: list[list[tuple[float, float]]]) -> dict[str, list[Option]]:
    return {
        f"l{i}": [Option(Candidate(1, k + 1), cost, loss) for k, (cost, loss) in enumerate(item)]
        for i, item in enumerate(layers)
    }


def brute_force(options: dict[str, list[Option]], budget: float) -> float:
    losses = [
        sum(o.loss for o in combination)
        for combination in itertools.product(*options.values())
        if sum(o.cost_us for o in combination) <= budget
    ]
    return min(losses, default=float("inf"))


@settings(max_examples=120, deadline=None)
@given(st.lists(layer, min_size=1, max_size=4), st.floats(0.3, 1.2))
def test_equals_brute_force(layers, share):
    options = options_of(layers)
    budget = share * sum(max(o.cost_us for o in choices) for choices in options.values())
    best = brute_force(options, budget)
    if best == float("inf"):
        with pytest.raises(InfeasibleBudgetError):
            solver.solve(options, budget)
        return
    found = solver.solve(options, budget)
    assert found.cost_us <= budget * (1 + 1e-6)
    assert found.loss <= best * (1 + 1e-3) + 1e-4


def test_brute_force_check_can_fail():
    """A greedy choice (largest saving first) is not optimal here, and the check would see it."""
    options = options_of([[(1, 3.0), (5, 0)], [(3, 1.0), (5, 0)], [(3, 1.0), (5, 0)]])
    assert brute_force(options, 11) == 2.0
    assert solver.solve(options, 11).loss == pytest.approx(2.0)


def test_looser_budget_is_never_worse_and_order_does_not_matter():
    options = options_of([[(k, 10 / k) for k in (1, 2, 4, 8)] for _ in range(6)])
    losses = [solver.solve(options, budget).loss for budget in (8, 12, 20, 30, 48)]
    assert losses == sorted(losses, reverse=True)
    backwards = dict(reversed(options.items()))
    assert solver.solve(backwards, 20).loss == pytest.approx(
        solver.solve(options, 20).loss, rel=1e-3
    )


def test_weights_move_the_choice():
    options = options_of([[(1, 1.0), (2, 0)], [(1, 1.0), (2, 0)]])
    heavy = solver.solve(options, 3, {"l0": 4.0})
    assert heavy.choices["l0"] == Candidate(1, 2)
    assert heavy.choices["l1"] == Candidate(1, 1)


def test_many_layers_within_seconds():
    options = options_of(
        [
            [(1 + 0.3 * k + i % 7, (20 - k) ** 2 * (1 + i % 5)) for k in range(20)]
            for i in range(300)
        ]
    )
    low = solver.cheapest(options)
    found = solver.solve(options, 1.4 * low)
    assert found.gap <= 1e-3
    assert low <= found.cost_us <= 1.4 * low * (1 + 1e-9)


def test_infeasible_names_the_minimum():
    with pytest.raises(InfeasibleBudgetError, match=r"cheapest plan takes 2\.0 us"):
        solver.solve(options_of([[(2, 1)]]), 1)


def test_undominated():
    a, b, c = Option(DENSE, 10, 0), Option(Candidate(1, 4), 5, 2), Option(Candidate(1, 8), 6, 3)
    assert undominated([a, b, c]) == [b, a]
