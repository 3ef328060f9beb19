"""Additivity, fitted factors, trials and moves, on losses that are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from landscape import Landscape

from blast_search import additivity, solver, study
from blast_search.deadline import FOREVER, Deadline
from blast_search.decision import RIVAL, rivals
from blast_search.engine import Contender
from blast_search.errors import BlastSearchError
from blast_search.hull import grouped
from blast_search.model_latency import Timing
from blast_search.moves import moves
from blast_search.space import Call, Candidate, LayerSpec
from blast_search.storage import Storage, check_database, without_password
from blast_search.trials import SHARES, Trials

TARGET = 0.4


def checked(world: Landscape) -> tuple[dict[str, float], dict[str, float]]:
    built = [world.exact(TARGET)]
    return additivity.check(world, TARGET, built, 0, FOREVER)  # type: ignore[arg-type]


def test_random_plans_differ_and_use_the_budget():
    world = Landscape(0)
    plans = additivity.random_plans(world, TARGET, [world.exact(TARGET)], 0)  # type: ignore[arg-type]
    assert len({tuple(p.items()) for p in plans}) == additivity.PLANS
    ratios = [world.predicted_ratio(p) for p in plans]
    assert max(ratios) <= TARGET
    assert min(ratios) > 0.8 * TARGET


def test_scores_that_add_up_are_not_called_poor():
    world = Landscape(0, hidden=0.0, single=0.0)
    values, replacing = checked(world)
    assert world.additivity["rank_correlation"] > 0.99
    assert not world.additivity["poor"]
    assert replacing == {}
    assert max(map(abs, values.values())) < 0.3


@pytest.mark.parametrize("seed", range(3))
def test_poor_additivity_falls_back_to_fitted_factors_and_they_lower_the_loss(seed: int):
    world = Landscape(seed, hidden=1.5)
    _, replacing = checked(world)
    found = world.additivity
    assert found["plans"] >= 50
    assert found["rank_correlation"] < additivity.POOR
    assert found["fitted_rank_correlation"] > found["rank_correlation"] + additivity.CLEARLY
    assert found["fallback"]
    plain, fitted = world.exact(TARGET), world.exact(TARGET, replacing)
    assert world.loss(fitted) < 0.95 * world.loss(plain)


def contender(rank: int) -> Contender:
    timing = Timing(1, 1, 1, 9, (1, 1), 2, 0, 0.5, (0.5, 0.5), 0.5, (0.5, 0.5))
    return Contender("x", {"a": Candidate(1, rank)}, timing, 0.5, True)


def test_only_close_and_different_plans_are_rivals():
    pool = {"exact": contender(8), "searched": contender(16), "uniform_blast": contender(24)}
    losses = {"exact": 1.05, "searched": 1.0, "uniform_blast": 1.0}
    assert rivals(pool, losses) == ["exact", "searched"]
    assert rivals(pool, losses | {"exact": RIVAL + 0.01}) == []  # too far behind
    assert rivals(pool, losses | {"uniform_blast": 0.5}) == []  # neither is near the best
    assert rivals(pool | {"searched": contender(8)}, losses) == []  # one plan under two names


def test_time_bounds_the_random_plans():
    world = Landscape(0)
    values, replacing = additivity.check(world, TARGET, [], 0, Deadline(0.0))  # type: ignore[arg-type]
    assert (values, replacing, world.additivity, world.asked) == ({}, {}, {}, [])


def test_moves_keep_the_budget_and_change_one_layer_up_and_one_down():
    world = Landscape(1)
    choices = world.exact(TARGET)
    groups = grouped(world.options())
    found = list(moves(groups, choices, TARGET * world.dense_cost))
    assert len(found) > 5
    cost = world.predicted_ratio(choices)
    for plan in found:
        changed = [n for n in plan if plan[n] != choices[n]]
        assert len(changed) == 2
        deltas = [world.by_key[n, plan[n]].cost_us - world.by_key[n, choices[n]].cost_us
                  for n in changed]  # fmt: skip
        assert min(deltas) < 0 < max(deltas)
        assert world.predicted_ratio(plan) <= TARGET
    assert cost <= TARGET


def test_moves_change_tied_layers_together():
    world = Landscape(1)
    ties = {ly.name: "t" for ly in world.layers if ly.name.endswith(".q")}
    choices = solver.solve(world.options(), TARGET * world.dense_cost, ties=ties).choices
    for plan in moves(grouped(world.options(), ties=ties), choices, TARGET * world.dense_cost):
        assert len({plan[name] for name in ties}) == 1


def run_trials(world: Landscape, path: Path, count: int, start: dict[str, float] | None = None):
    storage = Storage(f"sqlite:///{path}")
    trials = Trials(world, TARGET, storage, 0)  # type: ignore[arg-type]
    return trials, trials.run(count, start or {}, FOREVER)


def test_trials_start_from_the_exact_plan_lower_the_loss_and_resume(tmp_path: Path):
    world = Landscape(2)
    start, _ = checked(world)
    trials, tuned = run_trials(world, tmp_path / "a.db", 12, start)
    assert tuned is not None
    first, second = trials.study.trials[:2]
    assert set(first.params.values()) == {0.0}
    assert second.params == pytest.approx(start)
    assert first.user_attrs["losses"] == world.judged("", [world.exact(0.975 * TARGET)])[0]
    stages = [t.user_attrs["stage"] for t in trials.study.trials]
    assert stages[:6] == ["weights"] * 2 + ["step"] * 4
    assert set(stages[6:11]) <= {"step", "move"}  # moves where no step is left to try
    assert stages[11] == "move"
    assert world.tuning["steps_loss"] < world.tuning["exact_loss"]
    assert world.loss(tuned.choices) == pytest.approx(world.tuning["best_loss"])
    assert world.tuning["lowered_loss_by"] > 0.02
    assert world.predicted_ratio(tuned.choices) <= TARGET
    again = Landscape(2)
    resumed, _ = run_trials(again, tmp_path / "a.db", 12, start)
    assert again.asked == []
    assert [t.params for t in resumed.study.trials] == [t.params for t in trials.study.trials]


def test_after_a_batch_that_was_cut_short_the_next_one_starts_from_what_it_found(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("blast_search.trials.SHARES", (1.0, 0.5))  # two steps from a plan at most
    world = Landscape(2)
    trials, _ = run_trials(world, tmp_path / "a.db", 12)
    found = [(t.user_attrs["stage"], t.user_attrs["batch"]) for t in trials.study.trials]
    # The first two steps found a better plan: there are new steps from it, before any move.
    assert found[2:6] == [("step", [2, 2])] * 2 + [("step", [4, 2])] * 2
    for index, (_, (first, size)) in enumerate(found):
        assert first <= index < first + size
    firsts = sorted({tuple(batch) for _, batch in found})
    assert all(a + n == b for (a, n), (b, _) in pairwise(firsts))
    assert sum(firsts[-1]) == 12


def test_trials_go_on_without_steps_where_no_gradient_is_to_be_had(tmp_path: Path, monkeypatch):
    def no_gradient(self, plan, loss, deadline):
        raise RuntimeError("not differentiable")

    world, said = Landscape(2), list[str]()
    monkeypatch.setattr(Landscape, "tangent", no_gradient)
    monkeypatch.setattr(world.report, "say", said.append, raising=False)
    trials, tuned = run_trials(world, tmp_path / "a.db", 12)
    assert tuned
    stages = [t.user_attrs["stage"] for t in trials.study.trials]
    assert stages == ["weights"] * 2 + ["move"] * 10
    assert "no steps along the gradient at a plan: not differentiable" in said
    other = tuned.near(0.9 * TARGET)
    assert world.predicted_ratio(other) <= 0.9 * TARGET


def test_the_best_plan_is_moved_to_another_ratio_along_its_tangent(tmp_path: Path, monkeypatch):
    world = Landscape(2)
    _, tuned = run_trials(world, tmp_path / "a.db", 20)
    assert tuned
    for ratio in (0.95 * TARGET, 1.05 * TARGET):
        other = tuned.near(ratio)
        assert 0.97 * ratio < world.predicted_ratio(other) <= ratio
        assert world.loss(other) < world.loss(world.exact(ratio))
    world.latency.correction = 1.1  # found by the closed loop after the trials
    table = {
        n: [replace(o, cost_us=o.cost_us * (1 if o.candidate.is_dense else 1.1)) for o in found]
        for n, found in world.table.items()
    }
    monkeypatch.setattr(world, "options", lambda: table)
    costs = {(n, o.candidate): o.cost_us for n, found in table.items() for o in found}
    dearer = tuned.near(TARGET)
    assert sum(costs[item] for item in dearer.items()) <= TARGET * world.dense_cost * (1 + 1e-9)
    monkeypatch.undo()
    far = tuned.near(0.15)  # beyond the tangent's reach
    assert world.predicted_ratio(far) <= 0.15


def outcome(values: Mapping[str, float], prune: float = np.inf) -> study.Outcome:
    loss = sum((v - 0.5) ** 2 for v in values.values())
    return study.Outcome([loss], 0.3, -0.1, {"a": "dense"}, "weights", pruned=loss > prune)


@pytest.mark.parametrize("kept", range(13))
def test_trials_that_were_stopped_anywhere_go_on_as_if_they_had_not_been(
    tmp_path: Path, kept: int, whole: list[Any]
):
    """A study that holds the first `kept` trials, among them half batches, is continued."""
    part = Storage(f"sqlite:///{tmp_path}/part.db")
    study.Study([], part, 0)._stored.add_trials(whole[:kept])
    resumed, _ = run_trials(Landscape(2), tmp_path / "part.db", 12)
    assert [t.params for t in resumed.study.trials] == [t.params for t in whole]
    assert [t.values for t in resumed.study.trials] == [t.values for t in whole]
    plans = [t.user_attrs["plan"] for t in whole]
    assert [t.user_attrs["plan"] for t in resumed.study.trials] == plans


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    trials, _ = run_trials(Landscape(2), tmp_path_factory.mktemp("whole") / "s.db", 12)
    return trials.study.trials


def test_trials_of_a_batch_differ_and_see_nothing_of_each_other(tmp_path: Path):
    one, two = (
        study.Study(["x", "y"], Storage(f"sqlite:///{tmp_path / name}.db"), 7)
        for name in ("one", "two")
    )
    for first in range(0, 12, 4):
        for trial in one.ask(first, first + 4):
            one.tell(trial, outcome(trial.values, prune=2.0), (first, 4))
        for trial in two.ask(first, first + 4)[:2]:
            two.tell(trial, outcome(trial.values, prune=2.0), (first, 4))
        for trial in two.ask(first, first + 4)[2:]:  # half of the batch is known by now
            two.tell(trial, outcome(trial.values, prune=2.0), (first, 4))
    assert [t.params for t in one.trials] == [t.params for t in two.trials]
    assert len({tuple(t.params.values()) for t in one.trials}) == 12
    assert {t.state.name for t in one.trials} == {"COMPLETE", "PRUNED"}


def test_workers_take_over_each_others_trials_and_do_not_repeat_them(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    one, two = (study.Study(["x", "y"], Storage(url, "s", w), 0) for w in ("one", "two"))

    def run(worker: study.Study, starts: Sequence[Mapping[str, float]] = ()) -> None:
        done = len(worker.trials)
        (asked,) = worker.ask(done, done + 1, starts)
        worker.tell(asked, outcome(asked.values), (done, 1))
        worker.flush()

    run(one, [{}])
    for _ in range(3):  # neither knows the other's latest trial, both have the same number
        assert one.sync() == two.sync()
        run(one)
        run(two)
    assert one.sync() == two.sync() == 7
    assert [study.worker_of(t) for t in two.trials].count("one") == 4
    assert len({tuple(t.params.values()) for t in one.trials}) == 7


def test_a_run_alone_on_a_database_works_in_batches_and_goes_on_anywhere(tmp_path: Path):
    def run(file: str, count: int, worker: str = "me") -> list[Any]:
        storage = Storage(f"sqlite:///{tmp_path / file}", "s", worker)
        trials = Trials(Landscape(2), TARGET, storage, 0)  # type: ignore[arg-type]
        trials.run(count, {}, FOREVER)
        return trials.study.trials

    whole = run("whole.db", 12)
    assert [t.user_attrs["batch"] for t in whole[2:6]] == [[2, 4]] * 4
    storage = Storage(f"sqlite:///{tmp_path / 'part.db'}", "s-0.390", "me")
    study.Study([], storage, 0)._stored.add_trials(whole[:4])
    assert [t.params for t in run("part.db", 12)] == [t.params for t in whole]
    run("part.db", 14, "another")
    assert [t.user_attrs["batch"][1] for t in run("part.db", 17)[-3:]] == [1] * 3
    shares = {
        worker: Trials(Landscape(2), TARGET, Storage(storage.url, "s", worker), 0).shares()  # type: ignore[arg-type]
        for worker in ("me", "another")
    }
    assert shares["me"] != shares["another"]  # of one history they make different steps
    assert sorted(shares["me"]) == sorted(shares["another"]) == sorted(SHARES)


def test_a_database_that_cannot_be_used_is_one_plain_line():
    for url in ("nonsense", "sqlite:////nowhere/at/all/study.db"):
        with pytest.raises(BlastSearchError, match=r"--storage: the database .* cannot be used"):
            study.Study(["x"], Storage(url, worker="me"), 0)
        with pytest.raises(BlastSearchError, match="with --resume, give --storage again"):
            check_database(url)


def test_no_message_holds_a_password():
    for url in ("nonsense://me:s3cret@host/db", "nonsense://host/db?password=s3cret"):
        with pytest.raises(BlastSearchError, match="host/db cannot be used") as error:
            check_database(url)
        assert "s3cret" not in str(error.value)


def test_a_database_is_opened_and_closed_before_anything_is_measured(tmp_path: Path):
    check_database(url := f"sqlite:///{tmp_path / 'study.db'}")
    assert study.Study(["x"], Storage(url), 0).sync() == 0


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("postgresql+psycopg2://me:s3cret@host:5432/db", "postgresql+psycopg2://me@host:5432/db"),
        ("postgresql://me:s3%40cret@host/db?sslmode=require",
         "postgresql://me@host/db?sslmode=require"),
        ("postgresql://host/db?user=me&password=s3cret", "postgresql://host/db?user=me"),
        ("mysql+pymysql://me@host/db", "mysql+pymysql://me@host/db"),
        ("sqlite:////a b/study.db", "sqlite:////a b/study.db"),
        ("nonsense", "nonsense"),
        (None, None),
    ],
)  # fmt: skip
def test_a_url_is_kept_without_its_password(url: str | None, kept: str | None):
    assert without_password(url) == kept


def test_hopeless_trials_are_given_up(tmp_path: Path):
    world = Landscape(3, hidden=1.5)
    trials, _ = run_trials(world, tmp_path / "s.db", 40)
    pruned = [t for t in trials.study.trials if t.state.name == "PRUNED"]
    complete = study.finished(trials.study.trials)
    assert pruned
    assert world.tuning["pruned"] == len(pruned)
    for trial in pruned:
        assert len(trial.user_attrs["losses"]) < 4
        assert np.mean(trial.user_attrs["losses"]) > min(t.loss for t in complete)
    assert world.batches_seen < 4 * len(world.asked)


def test_interpolated_scales():
    from blast_search.sensitivity import between, spread_over_depth

    layers = [LayerSpec(f"h.{i}.{k}", 8, 8, True, (Call(1),)) for i in range(9) for k in "ab"]
    chosen = [layer.name for layer in spread_over_depth(layers)]
    assert chosen == [f"h.{i}.{k}" for k in "ab" for i in (1, 4, 7)]
    scales = between(layers, {"h.1.a": 1.0, "h.4.a": 4.0, "h.7.a": 1.0, "h.4.b": 2.0})
    assert [scales[f"h.{i}.a"] for i in range(9)] == [1, 1, 2, 3, 4, 3, 2, 1, 1]
    assert {scales[f"h.{i}.b"] for i in range(9)} == {2.0}


def test_scales_that_a_probe_cannot_tell_are_those_of_other_layers():
    from blast_search.sensitivity import ProbeTable, between, measured_scales

    layers = [LayerSpec(f"h.{i}.{k}", 8, 8, True, (Call(1),)) for i in range(3) for k in "abc"]
    probes, probe = ProbeTable(), Candidate(1, 2)
    for layer in layers:
        i, kind = int(layer.name[2]), layer.name[-1]
        # a: no token reached the middle one; b: of low rank; c: changes nothing in any layer
        error = 1e-6 if kind == "b" else 0.5
        loss = 1e-9 if kind == "b" else 0.0 if kind == "c" or i == 1 else 0.25 * (i + 1)
        probes.add("probe", layer.name, probe, error, loss)
    scales = measured_scales(dict.fromkeys(layers, probe), probes)
    assert scales == {"h.0.a": 1.0, "h.2.a": 3.0, "h.0.c": 0.0, "h.1.c": 0.0, "h.2.c": 0.0}
    every = between(layers, scales)
    assert [every[f"h.{i}.a"] for i in range(3)] == [1.0, 2.0, 3.0]
    assert [every[f"h.{i}.b"] for i in range(3)] == pytest.approx([0.8] * 3)
    assert {every[f"h.{i}.c"] for i in range(3)} == {0.0}
    assert set(between(layers, {}).values()) == {1.0}
