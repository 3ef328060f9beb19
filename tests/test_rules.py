"""Rules that could be broken unseen: with each of them changed, all other tests passed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from landscape import Landscape
from test_decision import TARGET, TIMING, Kinds, World, decided, plan, rank
from test_latency import fixed_series
from test_search_stages import run_trials
from test_solver import options_of
from torch import nn

from blast_search import additivity, drop, latency, model_latency, solver, study, workers
from blast_search.closed_loop import _best, meet
from blast_search.deadline import Deadline
from blast_search.decision import uniform_contenders
from blast_search.engine import Contender, Engine
from blast_search.errors import BlastSearchError
from blast_search.finish import Finish
from blast_search.hull import grouped
from blast_search.last_timing import Decision
from blast_search.latency import cells_for, interleave, measure_cell
from blast_search.layers import Workload, find_layers
from blast_search.model_latency import _narrow, _timing, time_variants
from blast_search.moves import moves
from blast_search.plan_check import CheckedPlan, cross_validated
from blast_search.sensitivity import ProbeTable, _gain, _probe
from blast_search.space import DENSE, Call, Candidate, LayerSpec, SearchSpace
from blast_search.tables import (
    Cell,
    LatencyTable,
    Measurement,
    Option,
    Score,
    ScoreTable,
    layer_options,
)
from blast_search.tangent import SPAN, near

T4 = 0.4


def _additive(seed, hidden, plans=50):
    rng = np.random.default_rng(seed)
    layers = [
        LayerSpec(f"h.{i}.{k}", 8, 8, True, (Call(1),)) for i in range(6) for k in "abcdefgh"
    ]
    sums = np.exp(rng.normal(0, 1, (plans, len(layers))))
    losses = np.exp(rng.normal(0, hidden, plans))  # nothing to do with the layers
    return additivity.judge(layers, sums, losses, 2)


def test_rounding_of_a_sum_is_no_reason_against_a_plan():
    options = options_of([[(0.1, 1.0)], [(0.2, 1.0)]])  # 0.1 + 0.2 > 0.3
    assert solver.solve(options, 0.3).cost_us == pytest.approx(0.3)


def test_a_layer_is_moved_once():
    world = Landscape(1)
    choices = world.exact(T4)
    found = moves(grouped(world.options()), choices, T4 * world.dense_cost)
    changed = [name for p in found for name in p if p[name] != choices[name]]
    assert len(changed) == len(set(changed))


def test_the_move_that_promises_most_comes_first():
    """Of two that keep the budget: a gain of 10 for a harm of 11 rather than 1 for 0.5."""
    table = {"a": (20, 10, 10), "b": (20, 10, 11), "c": (2, 1, 1), "d": (2, 1, 0.5)}
    options = {
        n: [Option(Candidate(1, 1), dear - step, loss), Option(Candidate(1, 2), dear, 0.0)]
        for n, (dear, step, loss) in table.items()
    }
    small, large = Candidate(1, 1), Candidate(1, 2)
    choices = {"a": small, "b": large, "c": small, "d": large}
    first = next(moves(grouped(options), choices, 33.0))
    assert first == {"a": large, "b": small, "c": small, "d": large}


def test_rare_and_small_types_share_a_parameter():
    layers = [
        LayerSpec(f"h.{i}.t{k}", 8, 8 * (k + 1), True, (Call(1),))
        for i in range(3)
        for k in range(10)
    ]
    groups = study.parameter_groups(layers)
    assert {groups[f"h.0.t{k}"][0] for k in (0, 1)} == {"type:other"}
    assert [groups[f"h.{i}.t9"] for i in range(3)] == [
        ("type:h.t9", f"depth:{i}") for i in range(3)
    ]


def test_trials_keep_a_budget_on_each_workload(tmp_path, monkeypatch):
    world = Landscape(2)
    real, exact = world.predicted_ratio, world.exact(0.975 * T4)

    def other(p):  # the layers of another workload
        return sum(world.by_key[n, c].cost_us for n, c in p.items() if n.endswith(".q"))

    share = real(exact) / other(exact)
    monkeypatch.setattr(world, "predicted_ratio", lambda p: max(real(p), share * other(p)))
    trials, _ = run_trials(world, tmp_path / "a.db", 20)
    found = [t for t in study.finished(trials.study.trials) if t.stage != "weights"]
    assert found
    plans = [{n: Candidate.from_key(k) for n, k in t.plan.items()} for t in found]
    assert max(map(world.predicted_ratio, plans)) <= 0.975 * T4 * (1 + 1e-9)


def test_a_tangent_is_drawn_with_the_correction_of_the_trials(tmp_path, monkeypatch):
    world, seen, real = Landscape(2), list[float](), Landscape.tangent

    def tangent(self, *arguments):
        seen.append(self.latency.correction)
        return real(self, *arguments)

    monkeypatch.setattr(Landscape, "tangent", tangent)
    trials, tuned = run_trials(world, tmp_path / "a.db", 12)
    trials._tangents.clear()  # as in a run that is resumed after its trials
    world.latency.correction = 1.1
    tuned.near(0.95 * T4)
    assert set(seen) == {1.0}
    assert world.latency.correction == 1.1


def test_the_correction_is_the_median_of_those_asked_for():
    real = {292: 1.09, 268: 0.95}  # the second timing is lucky
    world = World(lambda r, _: real.get(r, 1.0) * r / 1000)
    found = meet(world, "exact", world.exact, TARGET)
    assert found.choices == plan(287)  # 292.5 over the median of 1.09 and 0.95


def test_a_plan_whose_timing_was_lucky_is_not_the_best():
    world: Any = World(lambda *_: 0)  # rank r is estimated at r / 1000
    lucky, sure = (
        Contender("exact", plan(r), TIMING, ratio, True) for r, ratio in ((310, 0.29), (280, 0.27))
    )
    assert _best(world, [lucky, sure], TARGET) is sure
    assert _best(world, [lucky], TARGET) is lucky


def test_a_decision_leaves_the_correction_of_the_exact_plan(monkeypatch):
    world = Kinds(lambda *_: 0, losses={1: 1.0, 2: 0.5}, last={1: 1.0, 2: 0.85})
    decided(world, monkeypatch)
    assert world.latency.correction == 1.0


def test_showing_a_uniform_plan_over_the_budget_corrects_nothing(monkeypatch):
    world: Any = Kinds(lambda *_: 0)
    world.space = SimpleNamespace(num_blocks=(1, 2), uniform=False)
    slow = {"a": Candidate(1, 300), "b": Candidate(2, 2)}
    world.fastest_uniform = lambda _: slow
    world.time = lambda *_: [replace(TIMING, ratio_layers=0.5)]
    found = uniform_contenders(
        world, TARGET, {"uniform_blast": ("uniform BLAST", None)}, {"uniform BLAST": None}
    )
    assert not found["uniform_blast"][0].feasible
    assert world.latency.correction == 1.0


def test_of_two_winners_the_one_of_less_loss_stays():
    world = World(lambda r, _: 0.8 * r / 1000)  # leaves room, but the larger plan loses more
    world.true_loss = lambda _, choices: rank(choices)
    assert world.final(290).winner.choices == plan(290)


def test_no_more_than_two_larger_plans_are_timed():
    world = World(lambda *_: 0.2)  # leaves room each time
    assert world.final(290).met
    assert len(world.timed) == 3


def test_the_faster_of_two_calls_counts():
    made = iter([9.0, 3.0, 5.0, 4.0])
    times = interleave(
        {"a": lambda: None}, lambda: None, 0, min_rounds=2, best_of=2, timed=lambda _: next(made)
    )
    assert times["a"].tolist() == [3.0, 4.0]


def test_an_uncertain_cell_is_timed_once_more(monkeypatch):
    """The more certain attempt counts, whichever it is."""
    layer = LayerSpec("a", 64, 64, True, (Call(8),))
    cell = cells_for(
        [layer], SearchSpace(num_blocks=(1,), keep=(0.5,)), "d", torch.float32, "cpu"
    )[1]

    def wide(width, ratio):
        return {
            "dense": np.full(12, 10.0),
            "candidate": 10 * ratio * np.linspace(1 - width, 1 + width, 12),
        }

    for series, ratio, left in (
        ([wide(0.001, 0.5), wide(0.001, 0.7)], 0.5, 1),
        ([wide(0.3, 0.5), wide(0.5, 0.7)], 0.5, 0),
        ([wide(0.5, 0.5), wide(0.01, 0.7)], 0.7, 0),
    ):
        monkeypatch.setattr(latency, "interleave", lambda *_, s=series, **__: s.pop(0))
        assert measure_cell(cell, "cpu").ratio == pytest.approx(ratio)
        assert len(series) == left


def test_workloads_count_by_their_weights(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    workloads = [Workload("a", torch.randn(2, 8)), Workload("b", torch.randn(2, 8), 0.5)]
    layers = find_layers(model, workloads)
    times = [
        {"dense": [10.0] * 5, "fixed": [2.0] * 5, "x": [4.0] * 5},
        {"dense": [10.0] * 5, "fixed": [2.0] * 5, "x": [8.0] * 5},
    ]
    monkeypatch.setattr(model_latency, "interleave", fixed_series(times))
    timing = time_variants(model, layers, {"x": {"0": nn.Identity()}}, workloads, 0.1)["x"]
    assert timing.dense_ms == pytest.approx(15e-3)
    assert timing.median_ms == pytest.approx(8e-3)
    assert timing.ratio_layers == pytest.approx(5 / 12)  # (4 + 4 - 3) / (15 - 3)


def test_intervals_hold_what_they_should():
    """Of 400 series of 25 rounds, about 95 % of the intervals hold the median."""
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        mine = 50 * (1 + 0.05 * rng.standard_normal(25))
        t = _timing({"dense": np.full(25, 100.0), "fixed": np.full(25, 20.0), "x": mine}, "x")
        inside.append(
            [
                low <= true <= high
                for (low, high), true in (
                    (t.ci95_ms, 50),
                    (t.ratio_model_ci95, 0.5),
                    (t.ratio_layers_ci95, 0.375),
                )
            ]
        )
    assert ((np.mean(inside, axis=0) > 0.9) & (np.mean(inside, axis=0) < 0.99)).all()


def test_rounds_end_where_every_ratio_is_certain():
    rng = np.random.default_rng(0)
    steady, noisy = [50.0] * 24, list(50 + 10 * rng.standard_normal(24))
    dense = [100.0] * 24
    assert _narrow({"dense": dense, "fixed": steady, "x": steady})
    assert not _narrow({"dense": dense, "fixed": steady, "x": noisy})


def test_a_device_that_stopped_working_ends_the_profile(monkeypatch):
    def broken(_):
        def synchronize():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return synchronize

    monkeypatch.setattr(workers, "synchronizer", broken)
    layer = LayerSpec("a", 64, 64, True, (Call(8),))
    cells = cells_for([layer], SearchSpace(), "d", torch.float32, "cpu")[:3]
    seen = []

    def fail(cell, device_type):
        raise RuntimeError("illegal memory access")

    with pytest.raises(BlastSearchError, match="the device stopped working"):
        workers.measure_cells(cells, "cpu", lambda c, *r: seen.append(c), "local", measure=fail)
    assert seen == cells[:1]  # no other cell is blamed


def test_no_candidate_is_predicted_to_gain():
    layer = LayerSpec("a", 64, 64, True, (Call(8),))
    c = Candidate(1, 8)
    found = layer_options(
        [layer], lambda _: {DENSE: 10.0, c: 5.0}, ScoreTable({"a": {c: Score(0.1, -1e-4)}})
    )
    assert found["a"] == [Option(DENSE, 10.0, 0.0), Option(c, 5.0, 0.0)]


def test_the_dense_time_is_the_median_of_its_twins():
    table = LatencyTable("d1")
    layer = LayerSpec("a.0.fc", 48, 96, True, (Call(16),))
    for k, dense in enumerate((100.0, 104.0, 300.0)):  # other load while the last one was timed
        table.add(
            Cell("d1", "eager", "float32", "k", 96, 48, True, 16, Candidate(1, 8 * (k + 1))),
            Measurement(1, 1, 1, 9, dense, 0.5, 0.5, 0.5),
        )
    assert table.costs(layer)[DENSE] == 104.0


def test_factors_that_are_hardly_better_do_not_replace_the_scores(monkeypatch):
    """Factors that are hardly better than the plain scores do not take their place."""
    for fitted, replaces in ((0.64, False), (0.66, True)):
        answers = iter([0.6, fitted])
        monkeypatch.setattr(additivity, "correlation", lambda *_, a=answers: next(a))
        assert _additive(0, 1.0).replaces is replaces


def test_a_plan_is_predicted_without_its_own_timing():
    """Plans that have no block count in common: a fit to the others says nothing of a plan."""
    plans = []
    for b in (1, 2, 4, 8):
        ratio = 0.2 + 0.5 * 1.4
        plans.append(CheckedPlan({}, {0: 0.2, b: 0.5}, ratio, 10 + 90 * ratio, 100.0, 10.0))
    found = cross_validated(plans)
    assert found["corrected"] == 0.0
    assert found["median"] == pytest.approx((90 * 0.2) / (10 + 90 * 0.9))


def test_options_around_a_plan_lie_on_both_sides():
    options = {"a": [Option(Candidate(1, k), float(k), 10.0 - k) for k in range(1, 10)]}
    (group,) = grouped(options)
    ranks = [c.rank for c in near(group, 5.0)]
    assert ranks == list(range(5 - SPAN, 5 + SPAN + 1))


def test_the_ratio_is_the_worst_workloads_where_each_has_a_budget():
    timing = replace(TIMING, ratio_layers=0.3, by_workload=(0.2, 0.5))
    for names, ratio in ((["a", "b"], 0.5), ([], 0.3)):
        engine: Any = SimpleNamespace(latency=SimpleNamespace(workloads=names))
        assert Engine.latency_ratio(engine, timing) == ratio


def test_dense_wins_only_where_it_is_better():
    finish: Any = SimpleNamespace(
        settings=SimpleNamespace(budget=1.0),
        pipeline=SimpleNamespace(dense_metric=0.5),
        prepared=SimpleNamespace(task=SimpleNamespace(metric=("m", True))),
    )
    for target, value, dense in ((1.0, 0.49, True), (1.0, 0.5, False), (0.99, 0.49, False)):
        decision_: Any = SimpleNamespace(target=target)
        assert Finish.allows_dense(finish, decision_, value) is dense


def test_what_the_bisection_found_stands_where_the_search_fails(monkeypatch):
    best, other = (
        Contender(n, plan(r), TIMING, 0.5, True) for n, r in ((drop.KEY, 500), ("exact", 480))
    )
    monkeypatch.setattr(drop, "_bisect", lambda *_: best)
    finish: Any = SimpleNamespace(
        settings=SimpleNamespace(trials=3, seed=0), engine=None, models=None
    )
    for met in (False, True):
        made = Decision(other, {}, 0.5, TIMING, 3, met, weights={"a": 1.0})
        monkeypatch.setattr(drop, "decide", lambda *_, d=made: d)
        found = drop.within_drop(finish, TIMING, None)
        assert found.met
        assert found.winner is (other if met else best)
        assert found.baselines == ({drop.KEY: best} if met else {})


def test_some_layers_are_probed_whatever_the_time():
    layers = [LayerSpec(f"h.{i}.{k}", 8, 8, True, (Call(1),)) for i in range(9) for k in "ab"]
    asked = []

    class Seats:
        judge = SimpleNamespace(batches=[0, 1], layers=layers)

        def session(self, _):
            return nullcontext()

        def ask(self, questions, record, deadline):
            for index, question in enumerate(questions):
                if not deadline.expired():
                    asked.append(next(iter(question.choices)))
                    record(index, [1.0])

    fitter: Any = SimpleNamespace(basis=lambda _: SimpleNamespace(error=lambda _: 0.5))
    seats: Any = Seats()
    _probe(
        dict.fromkeys(layers, Candidate(1, 2)),
        fitter,
        seats,
        ProbeTable(),
        Deadline(0.0),
        lambda: None,
    )
    assert asked == [f"h.{i}.{k}" for k in "ab" for i in (1, 4, 7)]


def test_gains_beyond_the_fitted_ranks_are_those_of_the_ends():
    layer = LayerSpec("h.0.a", 64, 64, True, (Call(8),))
    gains = {("h.a", (64, 64), 2): [(10, 0.9), (20, 0.7)]}
    found = [_gain(gains, layer, Candidate(2, r)) for r in (5, 10, 15, 20, 40)]
    assert found == pytest.approx([0.9, 0.9, 0.8, 0.7, 0.7])
    assert _gain(gains, layer, Candidate(4, 15)) == 1.0


def test_small_layers_have_ranks_between_the_multiples():
    space = SearchSpace(num_blocks=(1,))
    tiny = LayerSpec("t", 32, 32, False, (Call(1),))
    ranks = [c.rank for c in space.candidates(tiny)[1:]]
    assert len(ranks) > 5  # multiples of 8 would be one or two
