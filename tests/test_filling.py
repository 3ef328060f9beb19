"""What a uniform winner leaves of the budget: filled up, and worse in no layer."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy import ToyTask

import blast_search as bs
from blast_search.engine import Contender, Engine
from blast_search.filling import FILLED, filled, no_worse, own
from blast_search.finish import Finish
from blast_search.last_timing import Decision
from blast_search.latency_model import LatencyModel
from blast_search.pipeline import opened
from blast_search.progress import SILENT
from blast_search.settings import Settings
from blast_search.space import SearchSpace
from blast_search.tables import LatencyTable

# Ranks in large steps: uniform plans then come in few sizes.
SPACE = SearchSpace(
    name="default", num_blocks=(1, 2), keep=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), rank_multiple=32
)
TARGET = 0.45


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    settings = Settings("toy", TARGET, "macs", profile="pruned")
    out = tmp_path_factory.mktemp("filling") / "toy"
    with opened(settings, ToyTask(), SPACE, out, False, "local", None, SILENT) as pipeline:
        yield pipeline.measured()


def uniform(engine: Engine, ratio: float = TARGET) -> Contender:
    choices = engine.largest_uniform(1, ratio)
    (timing,) = engine.time("uniform", {"uniform": choices}, 0.1)
    measured = engine.measured_ratio(choices, timing)
    return Contender("uniform low rank", choices, timing, measured, True)


def decision(winner: Contender, target: float = TARGET) -> Decision:
    return Decision(winner, {}, target, winner.timing, 0, True)


def test_a_filled_plan_uses_the_budget_and_is_worse_in_no_layer(engine: Engine):
    start = uniform(engine)
    before = engine.latency.correction
    larger = filled(engine, decision(start), start)
    assert engine.latency.correction == before  # the ratio here is one of sizes
    assert larger
    assert larger.name == f"{FILLED} uniform low rank"
    assert start.ratio < larger.ratio <= TARGET
    losses = {
        plan: [engine.scorer.score(ly, c.choices[ly.name]).loss for ly in engine.layers]
        for plan, c in (("before", start), ("after", larger))
    }
    assert all(a <= b for a, b in zip(losses["after"], losses["before"], strict=True))
    assert sum(losses["after"]) < sum(losses["before"])
    assert engine.points[-1].name == larger.name
    assert engine.rounds == []  # counted, not predicted: nothing that could be off


def test_predictions_on_file_stay_those_of_the_decision(monkeypatch):
    """Whatever the loop that fills a plan corrects the latency table by."""

    def fill(engine, *_):
        engine.latency.correction = 3.0

    monkeypatch.setattr("blast_search.finish.filled", fill)
    done = object.__new__(Finish)
    done.engine = SimpleNamespace(latency=LatencyModel((), LatencyTable("some"), 1.2))  # type: ignore[assignment]
    done.settings = SimpleNamespace(budget=0.5, time_limit=None)  # type: ignore[assignment]
    assert done.filled(None, SimpleNamespace(name="uniform BLAST")) is None  # type: ignore[arg-type]
    assert done.engine.latency.correction == 1.2


def test_nothing_is_filled_where_little_is_left(engine: Engine):
    start = uniform(engine)
    assert filled(engine, decision(start, start.ratio * 1.05), start) is None
    full = replace(start, ratio=TARGET)
    assert filled(engine, decision(full), full) is None
    dense = replace(start, choices=dict.fromkeys(start.choices, bs.space.DENSE))
    assert filled(engine, decision(dense, 2.0), dense) is None


def test_the_uniform_plan_itself_can_always_be_chosen(engine: Engine):
    odd = {ly.name: bs.space.Candidate(1, 37) for ly in engine.layers}  # off the grid
    options = no_worse(engine, odd)
    for layer in engine.layers:
        mine = own(engine, layer, odd[layer.name])
        assert mine in options[layer.name]
        assert max(o.loss for o in options[layer.name]) == mine.loss


def test_a_run_that_a_uniform_plan_wins_fills_it_up(tmp_path: Path, monkeypatch):
    best = Finish.best

    def uniform_wins(self, contenders, values):
        if FILLED not in contenders:
            return "uniform_low_rank"
        found = best(self, {k: contenders[k] for k in ("uniform_low_rank", FILLED)}, values)
        assert found in (FILLED, "uniform_low_rank")
        return FILLED

    monkeypatch.setattr(Finish, "best", uniform_wins)
    options = {"space": SPACE, "workers": "local", "trials": 2, "retrain_steps": 2}
    out = tmp_path / "run"
    run = bs.search(ToyTask(), TARGET, budget_scope="macs", out=out, **options)
    plan = bs.Plan.load(out)
    low_rank = bs.Plan.load(out / "plans" / "uniform-low-rank.json")
    assert "went to single layers" in plan.search["verdict"]
    assert plan.choices == bs.Plan.load(out / "plans" / "filled.json").choices
    assert plan.choices != low_rank.choices
    assert low_rank.measured["macs_ratio"] < plan.measured["macs_ratio"] <= TARGET
    assert plan.measured["metric"] == plan.baselines[FILLED]["metric"]
    assert None not in plan.measured["metric"].values()
    model, x = bs.load(out / "model", ToyTask().model), ToyTask().workload()
    with torch.no_grad():
        assert torch.equal(model(x), run.model(x))
    with (out / "front.csv").open() as stream:
        front = {row["name"]: row for row in csv.DictReader(stream)}
    assert {"filled uniform low rank", "searched"} < set(front)
    assert float(front["chosen"]["predicted_loss_increase"]) == pytest.approx(
        plan.predicted["score_increase"], rel=1e-4
    )
    assert front["chosen"]["measured_layer_latency_ratio"]
    measured = (out / "measured.csv").read_text()
    again = bs.search(ToyTask(), TARGET, budget_scope="macs", out=out, resume=True, **options)
    assert again.plan.choices == plan.choices
    added = (out / "measured.csv").read_text()[len(measured) :].splitlines()
    assert {line.split(",")[0] for line in added} <= {"retrained 2 steps"}


def test_options_follow_every_change_of_what_they_cost(engine: Engine):
    latency = replace(engine.latency, correction=1.0, factors={})
    timed = replace(engine, scope="layers", latency=latency, _options={})
    name = timed.layers[0].name

    def costs() -> dict[str, float]:
        return {o.candidate.key: o.cost_us for o in timed.options()[name]}

    first = costs()
    timed.options().clear()  # what it returns belongs to the caller
    assert costs() == first
    timed.latency.correction = 2.0
    slower = costs()
    assert slower["dense"] == first["dense"]
    assert all(slower[key] == 2 * first[key] for key in first if key != "dense")
    timed.latency.correction = 1.0
    timed.latency.factors = {1: 3.0}
    key = next(k for k in first if k.startswith("b1"))
    assert costs()[key] == pytest.approx(3 * first[key])
    timed.latency.factors, timed.latency.table = {}, LatencyTable(timed.latency.table.device)
    for cell, measured in engine.latency.table.cells.items():
        timed.latency.table.cells[cell] = measured and replace(
            measured, dense_us=10 * measured.dense_us
        )
    timed.latency.table_changed()
    assert costs()["dense"] == pytest.approx(10 * first["dense"])
