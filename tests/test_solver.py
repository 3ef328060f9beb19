"""The exact solver and the hull of plans against brute force, and their limits."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from blast_search import solver
from blast_search.errors import IncompatibleInputError, InfeasibleBudgetError
from blast_search.hull import Limit
from blast_search.space import DENSE, Call, Candidate, LayerSpec, SearchSpace, ties_of
from blast_search.tables import Option

INF = float("inf")
Options = dict[str, list[Option]]


def cheapest(options: dict[str, list[Option]]) -> float:
    return sum(min(option.cost_us for option in items) for items in options.values())


def options_of(layers: list[list[tuple[float, float]]]) -> Options:
    return {
        f"l{i}": [Option(Candidate(1, k + 1), cost, loss) for k, (cost, loss) in enumerate(item)]
        for i, item in enumerate(layers)
    }


def weighted(options: Options, choices: dict[str, Candidate], weights: dict[str, float]) -> float:
    return sum(
        weights.get(name, 1.0) * o.loss
        for name, items in options.items()
        for o in items
        if o.candidate == choices[name]
    )


def brute_force(
    options: Options,
    budget: float,
    weights: dict[str, float] | None = None,
    ties: dict[str, str] | None = None,
    limits: list[Limit] | None = None,
) -> float:
    best = INF
    for combination in itertools.product(*options.values()):
        choices = {n: o.candidate for n, o in zip(options, combination, strict=True)}
        shared: dict[str, set[Candidate]] = {}
        for name, tie in (ties or {}).items():
            shared.setdefault(tie, set()).add(choices[name])
        within = sum(o.cost_us for o in combination) <= budget * (1 + 1e-9) and all(
            sum(x.usage(n, c) for n, c in choices.items()) <= x.limit * (1 + 1e-9)
            for x in limits or ()
        )
        if within and all(len(found) == 1 for found in shared.values()):
            best = min(best, weighted(options, choices, weights or {}))
    return best


def random_case(rng: random.Random):
    """Up to five layers; whole numbers half of the time, so that sums meet limits exactly."""
    whole = rng.random() < 0.5

    def draw(low: int, high: int) -> float:
        return float(rng.randint(low, high)) if whole else rng.uniform(low, high)

    names = [f"l{i}" for i in range(rng.randint(1, 5))]
    options = {
        name: [Option(Candidate(1, k + 1), draw(1, 10), draw(0, 6)) for k in range(size)]
        for name, size in ((name, rng.randint(1, 5)) for name in names)
    }
    ties = {names[0]: "t", names[-1]: "t"} if len(names) > 2 and rng.random() < 0.5 else {}
    weights = {name: rng.uniform(0.3, 3) for name in names} if rng.random() < 0.5 else {}
    limits = []
    for row in range(rng.randint(0, 2)):
        table = {(n, o.candidate): draw(row, 10) for n, items in options.items() for o in items}
        most = sum(max(table[n, o.candidate] for o in items) for n, items in options.items())
        bound = rng.uniform(0.6, 1.1) * most
        limits.append(
            Limit(f"row {row}", lambda n, c, t=table: t[n, c], round(bound) if whole else bound)
        )
    most = sum(max(o.cost_us for o in items) for items in options.values())
    budget = rng.uniform(0.4, 1.1) * most
    return options, round(budget) if whole else budget, weights, ties, limits


def test_a_thousand_random_cases_equal_brute_force():
    rng = random.Random(0)
    feasible = 0
    for _ in range(1000):
        options, budget, weights, ties, limits = random_case(rng)
        best = brute_force(options, budget, weights, ties, limits)
        if best == INF:
            with pytest.raises(InfeasibleBudgetError):
                solver.solve(options, budget, weights, ties=ties, limits=limits)
            continue
        feasible += 1
        found = solver.solve(options, budget, weights, ties=ties, limits=limits, gap=0.0)
        assert weighted(options, found.choices, weights) == pytest.approx(best, rel=1e-9, abs=1e-9)
        assert found.gap <= 1e-6
    assert feasible > 500


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


def test_weights_move_the_choice_and_are_not_in_the_loss():
    options = options_of([[(1, 1.0), (2, 0)], [(1, 1.0), (2, 0)]])
    heavy = solver.solve(options, 3, {"l0": 4.0})
    assert heavy.choices == {"l0": Candidate(1, 2), "l1": Candidate(1, 1)}
    assert heavy.loss == 1.0


def large(layers: int, candidates: int) -> Options:
    """Losses that fall with cost, convex up to noise, at scales that differ between layers."""
    rng = np.random.default_rng(layers)
    keep = np.sort(rng.uniform(0.05, 1, (layers, candidates)), axis=1)
    cost = rng.uniform(50, 500, (layers, 1)) * (1.2 * keep + rng.uniform(0, 0.1, keep.shape))
    loss = np.exp(rng.normal(0, 1, (layers, 1))) * (1 - keep) ** 2 * rng.uniform(0.8, 1.2)
    pairs = np.stack([cost, loss], axis=2)
    return options_of([[(float(c), float(x)) for c, x in layer] for layer in pairs])


def test_a_thousand_layers_of_twenty_candidates_with_a_proven_gap():
    options = large(1000, 20)
    low = cheapest(options)
    found = solver.solve(options, 2.5 * low)
    assert found.gap <= 1e-3
    assert low <= found.cost_us <= 2.5 * low * (1 + 1e-9)
    # Out of time at once: still a plan, and what is known of its gap.
    hurried = solver.solve(options, 2.5 * low, time_limit_s=0.0, gap=0.0)
    assert hurried.cost_us <= 2.5 * low * (1 + 1e-9)
    assert 0 < hurried.gap < 0.02
    assert hurried.loss * (1 - hurried.gap) <= found.loss


def test_several_limits_on_many_layers():
    options = large(120, 12)
    budget = 2.5 * cheapest(options)
    free = solver.solve(options, budget)
    used = float(sum(c.rank for c in free.choices.values()))
    tight = Limit("ranks", lambda _, c: float(c.rank), 0.9 * used)
    found = solver.solve(options, budget, limits=[tight])
    assert sum(c.rank for c in found.choices.values()) <= tight.limit
    assert found.loss >= free.loss * (1 - solver.GAP)
    assert found.gap <= 1e-3


def test_the_front_is_the_hull_of_all_plans():
    rng = random.Random(1)
    for _ in range(30):
        options = options_of(
            [[(rng.uniform(1, 9), rng.uniform(0, 5)) for _ in range(4)] for _ in range(4)]
        )
        front = solver.front(options)
        prices = (front.loss[:-1] - front.loss[1:]) / np.diff(front.cost_us)
        assert (np.diff(prices) <= 1e-12).all()
        assert front.cost_us[0] == pytest.approx(cheapest(options))
        for k, (cost, loss) in enumerate(zip(front.cost_us, front.loss, strict=True)):
            assert loss == pytest.approx(brute_force(options, cost), abs=1e-9)
            assert weighted(options, front.choices(k), {}) == pytest.approx(loss, abs=1e-9)


def test_infeasible_names_the_minimum_and_the_limit():
    with pytest.raises(InfeasibleBudgetError, match=r"cheapest plan takes 2\.0 us"):
        solver.solve(options_of([[(2, 1)]]), 1)
    memory = Limit("memory", lambda _, c: 8.0 * c.rank, 7.0)
    with pytest.raises(InfeasibleBudgetError, match=r"memory: at least 8\.0, the limit is 7\.0"):
        solver.solve(options_of([[(2, 1)]]), 3, limits=[memory])
    # Each limit can be met, but not both: the small rank is the slow one.
    options = options_of([[(5, 1), (2, 1)]])
    with pytest.raises(InfeasibleBudgetError, match="together"):
        solver.solve(options, 3, limits=[Limit("memory", lambda _, c: float(c.rank), 1.0)])


def test_tied_layers_need_a_common_candidate():
    options = {"a": [Option(DENSE, 1, 0)], "b": [Option(Candidate(1, 2), 1, 0)]}
    with pytest.raises(IncompatibleInputError, match="no candidate in common"):
        solver.solve(options, 9, ties={"a": "t", "b": "t"})


def test_ties_of_a_space():
    space = SearchSpace(ties=("*.#.attn.[qk]", "*.mlp"))

    def layer(name: str, m: int) -> LayerSpec:
        return LayerSpec(name, 8, m, True, (Call(1),), (), space.tie(name, (m, 8)))

    layers = [layer(f"h.{i}.{kind}", 8) for i in (0, 11) for kind in ("attn.q", "attn.k", "mlp")]
    layers += [layer("h.11.attn.v", 8), layer("h.0.wide.mlp", 16)]
    groups: dict[str, set[str]] = {}
    for name, tie in ties_of(layers).items():
        groups.setdefault(tie, set()).add(name)
    assert sorted(map(sorted, groups.values())) == [
        ["h.0.attn.k", "h.0.attn.q"], ["h.0.mlp", "h.11.mlp"], ["h.0.wide.mlp"],
        ["h.11.attn.k", "h.11.attn.q"],
    ]  # fmt: skip


def test_the_least_ratio_is_found_to_a_thousandth():
    def solve(ratio: float) -> float:
        if ratio < 0.2345:
            raise InfeasibleBudgetError("too small")
        return ratio

    ratio, found = solver.least(solve)
    assert 0.2345 <= ratio <= 0.2345 + solver.STEP
    assert found == ratio
