"""Measuring with an injected clock, cells, workers (also real Ray), and whole-model timing."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toy import Net, ToyTask

from blast_search import model_latency, workers
from blast_search.decision import infeasible
from blast_search.engine import Contender
from blast_search.errors import BlastSearchError, InfeasibleBudgetError, UsageError
from blast_search.evaluate import count_macs
from blast_search.last_timing import Decision
from blast_search.latency import (
    cells_for,
    environment,
    fingerprint,
    interleave,
    measure_cell,
    missing_cells,
)
from blast_search.latency_model import LatencyModel, error_statistics
from blast_search.layers import Workload, find_layers, inventory
from blast_search.model_latency import time_variants
from blast_search.solver import solve
from blast_search.space import DENSE, Call, Candidate, LayerSpec, SearchSpace
from blast_search.tables import Cell, LatencyTable, Measurement, Option, corrected

SPACE = SearchSpace(num_blocks=(1, 2), keep=(0.2, 0.5))


def test_interleave_rotates_prepares_and_counts():
    log: list[str] = []
    ticks = itertools.count(0, 1000)  # every reading of the clock is one microsecond later
    times = interleave(
        {"a": lambda: log.append("a"), "b": lambda: log.append("b")},
        lambda: None, seconds=0, min_rounds=4, prepare=lambda name: log.append(f"prepare {name}"),
        clock=lambda: next(ticks),
    )  # fmt: skip
    assert {k: v.tolist() for k, v in times.items()} == {"a": [1.0] * 4, "b": [1.0] * 4}
    warm, timed = log[:12], log[12:]
    assert warm == ["prepare a", "a"] * 3 + ["prepare b", "b"] * 3
    assert [e for e in timed if "prepare" not in e] == list("abbaabba")


def test_cells_are_shared_between_equal_layers():
    task = ToyTask()
    layers, _ = inventory(task.model(), [Workload("w", task.workload())], SPACE)
    cells = cells_for(layers, SPACE, "d", torch.float32, "cpu")
    assert len(layers) == 6
    assert len({(c.out_features, c.in_features) for c in cells}) == 2
    assert len(cells) == 2 * len(SPACE.candidates(layers[0]))
    assert {c.kernel.partition("-")[0] for c in cells} == {"dense", "tiled"}


def test_measure_cell_has_a_spread_and_a_twin():
    layer = LayerSpec("a", 64, 64, True, (Call(8),))
    for cell in cells_for([layer], SPACE, "d", torch.float32, "cpu"):
        m = measure_cell(cell, "cpu", seconds=0.01)
        assert 0 < m.p10_us <= m.median_us <= m.p90_us
        assert m.runs >= 12
        assert m.dense_us > 0
        if cell.candidate.is_dense:
            assert m.ratio == 1.0


def test_resume_is_the_grid_minus_the_cells_on_file():
    layer = LayerSpec("a", 64, 64, True, (Call(8),))
    cells = cells_for([layer], SPACE, "d", torch.float32, "cpu")
    table = LatencyTable("d", None, {cells[0]: None, cells[2]: None})
    assert missing_cells(table, cells) == [cells[1], *cells[3:]]


def test_fingerprint_changes_with_what_matters():
    env = environment(torch.device("cpu"))
    assert fingerprint(env) == fingerprint(dict(env))
    assert fingerprint(env | {"threads": 99}) != fingerprint(env)
    assert fingerprint(env | {"torch": "1.0"}) != fingerprint(env)
    assert fingerprint(env | {"python": "9"}) == fingerprint(env)


class CompilationError(Exception):
    """Not a RuntimeError, as a compiler's errors are not."""


def measure_or_fail(cell, device_type):
    if cell.candidate.rank == 4:
        raise CompilationError("too many\nregisters")
    return measure_cell(cell, device_type, seconds=0.01)


@pytest.mark.parametrize("mode", ["local", "ray"])
def test_workers_report_failed_cells_and_go_on(mode):
    cloudpickle = pytest.importorskip("ray").cloudpickle
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    layer = LayerSpec("a", 64, 64, True, (Call(8),))
    device = fingerprint(environment(torch.device("cpu")) | {"dtype": "float32"})
    cells = cells_for([layer], SearchSpace(), device, torch.float32, "cpu")[:6]
    seen: dict[Candidate, tuple[Measurement | None, str]] = {}
    workers.measure_cells(
        cells, "cpu", lambda c, *r: seen.update({c.candidate: r}), mode, measure=measure_or_fail
    )
    assert set(seen) == {c.candidate for c in cells}
    assert seen.pop(Candidate(1, 4)) == (None, "failed: CompilationError: too many registers")
    assert all(status == "ok" and m and m.ratio > 0 for m, status in seen.values())


def test_ray_address_where_nothing_listens_fails_in_seconds():
    pytest.importorskip("ray")
    layer = LayerSpec("a", 64, 64, True, (Call(8),))
    cells = cells_for([layer], SPACE, "d", torch.float32, "cpu")
    with pytest.raises(BlastSearchError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        workers.measure_cells(cells, "cpu", lambda *r: None, "ray", "127.0.0.1:9")


def test_ray_client_addresses_are_refused():
    pytest.importorskip("ray")
    cells = cells_for([LayerSpec("a", 64, 64, True, (Call(8),))], SPACE, "d", torch.float32, "cpu")
    with pytest.raises(UsageError, match="client protocol"):
        workers.measure_cells(cells, "cpu", lambda *r: None, "ray", "ray://127.0.0.1:10001")


def test_worker_modes():
    assert workers.resolve("local") == "local"
    with pytest.raises(UsageError, match="auto, ray, local"):
        workers.resolve("dask")


def table_of(dense_us: float, ratio: float) -> Measurement:
    return Measurement(dense_us * ratio, 1, 1, 20, dense_us, ratio, ratio, ratio)


def table_for(layers, ratio: float) -> LatencyTable:
    table = LatencyTable("d")
    for cell in cells_for(layers, SPACE, "d", torch.float32, "cpu"):
        r = 1.0 if cell.candidate.is_dense else ratio * cell.candidate.rank / 10
        table.add(cell, Measurement(100 * r, 90 * r, 110 * r, 20, 100.0, r, r, r))
    return table


def test_latency_model_adds_corrects_and_interpolates():
    layers = find_layers(Net())[:4]
    model = LatencyModel(layers, table_for(layers, 0.5))
    dense = {layer.name: DENSE for layer in layers}
    assert model.ratio(dense) == pytest.approx(1.0)
    low, high = (c for c in SPACE.candidates(layers[0]) if c.num_blocks == 1)
    assert model.ratio(dense | {layers[0].name: low}) == pytest.approx(
        (3 + 0.5 * low.rank / 10) / 4
    )
    middle = Candidate(1, (low.rank + high.rank) // 2)  # never measured
    assert model.ratio(dense | {layers[0].name: middle}) == pytest.approx(
        (3 + 0.5 * middle.rank / 10) / 4
    )
    plan = dense | {layers[0].name: low}
    model.correction = model.asked_correction(plan, 0.9)  # what a measured ratio of 0.9 asks for
    assert model.ratio(plan) == pytest.approx(0.9)
    assert model.ratio(dense) == pytest.approx(1.0)  # layers left dense need no correction
    assert model.ratio(dense | {layers[0].name: Candidate(16, 4)}) is None
    model = LatencyModel(layers, table_for(layers, 9 / high.rank))  # at that rank, 0.9 of dense
    plan = {layers[0].name: low, layers[1].name: high, layers[2].name: Candidate(16, 4)}
    assert model.worthwhile(plan) == plan | {layers[2].name: DENSE}
    model = LatencyModel(layers, table_for(layers, 10 / high.rank))
    assert model.worthwhile(plan) == dict.fromkeys(plan, DENSE) | {layers[0].name: low}


def test_a_budget_on_each_workload_counts_the_worst():
    """One layer is called in both workloads, the other in one; low rank pays only in "long"."""
    both = LayerSpec("a", 64, 64, True, (Call(32, 1.0, "long"), Call(8, 0.5, "short")))
    late = LayerSpec("b", 64, 64, True, (Call(8, 0.5, "short"),))
    table, low = LatencyTable("d"), Candidate(1, 8)
    for tokens, dense_us, ratio in ((32, 400.0, 0.2), (8, 100.0, 0.9)):
        cell = Cell("d", "eager", "float32", "x", 64, 64, True, tokens, low)
        table.add(cell, Measurement(dense_us * ratio, 1, 1, 20, dense_us, ratio, ratio, ratio))
    layers = [both, late]
    each = LatencyModel(layers, table, workloads=["long", "short"])
    summed = LatencyModel(layers, table)
    plan = {"a": low, "b": DENSE}
    assert summed.ratio(plan) == each.total(plan) == pytest.approx((80 + 45 + 50) / 500)
    assert each.ratio(plan) == pytest.approx(0.95)  # "short": (0.9 + 1) / 2
    assert each.ratio({"a": DENSE, "b": DENSE}) == pytest.approx(1.0)
    each.correction = each.asked_correction(plan, 0.9)
    assert each.ratio(plan) == pytest.approx(0.9)
    two = Candidate(2, 8)  # timed in one workload only: it failed in the other
    table.add(Cell("d", "eager", "float32", "x", 64, 64, True, 32, two), table_of(400.0, 0.1))
    each.table_changed()
    assert each.ratio({"a": two, "b": DENSE}) is None
    # The solver's rows say the same: only both layers in low rank keep 0.85 on each.
    each.correction = 0.9
    options = {
        ly.name: [
            Option(c, each.costs(ly.name)[c], loss) for c, loss in ((DENSE, 0.0), (low, 1.0))
        ]
        for ly in layers
    }
    options = corrected(options, each.factor)
    for ratio, limits, low_rank in ((0.85, [], 1), (0.85, each.limits(0.85), 2)):
        found = solve(options, ratio * each.dense_us, limits=limits).choices
        assert list(found.values()).count(low) == low_rank
    with pytest.raises(InfeasibleBudgetError, match="workload short"):
        solve(options, 0.5 * each.dense_us, limits=each.limits(0.5))


def test_error_statistics():
    stats = error_statistics([(1.0, 1.0), (1.1, 1.0), (0.8, 1.0)])
    assert stats["median"] == pytest.approx(0.1)
    assert stats["worst"] == pytest.approx(0.2)
    assert error_statistics([]) == {}


def test_time_variants_restores_the_model_and_reports_ratios():
    task = ToyTask()
    model = task.model()
    workloads = [Workload("a", task.workload()), Workload("b", task.data[:4], 0.5)]
    layers, _ = inventory(model, workloads, SPACE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dense = {layer.name: model.get_submodule(layer.name) for layer in layers}
    timing = time_variants(model, layers, {"same": dense}, workloads, 0.2)["same"]
    assert timing.runs >= 12
    assert timing.fixed_ms < timing.dense_ms
    assert timing.ci95_ms[0] <= timing.median_ms <= timing.ci95_ms[1]
    assert 0.2 < timing.ratio_model < 5
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_model_of_searched_layers_only_is_timed_on_two_workloads():
    model = nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 256)).eval()
    workloads = [Workload("a", torch.randn(64, 256)), Workload("b", torch.randn(32, 256))]
    layers = find_layers(model)
    same = {layer.name: model.get_submodule(layer.name) for layer in layers}
    timing = time_variants(model, layers, {"same": same}, workloads, 0.1)["same"]
    assert len(timing.by_workload) == 2
    # Also where a variant has no parameters at all.
    bare = {layer.name: nn.Identity() for layer in layers}
    time_variants(model, layers, {"bare": bare}, workloads, 0.1)


def fixed_series(series: list[dict[str, list[float]]]):
    """In the place of `interleave`: the times of dense and fixed, workload by workload."""
    left = iter(series)
    return lambda *_, **__: {name: np.array(times) for name, times in next(left).items()}


def branches() -> tuple[nn.Module, list[Workload]]:
    """Only the first workload calls the searched layer."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.image(x).relu() if x.shape[-1] == 64 else x.cumsum(-1)

    return Branches(), [Workload("i", torch.randn(2, 64)), Workload("t", torch.randn(2, 9))]


def test_workloads_of_different_many_rounds_are_summed_over_those_that_all_have(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    workloads = [Workload(name, torch.randn(2, 8)) for name in ("a", "b", "c")]
    layers = find_layers(model, workloads)
    times = [{"dense": [10.0] * n, "fixed": [2.0] * n, "x": [6.0] * n} for n in (9, 5, 7)]
    monkeypatch.setattr(model_latency, "interleave", fixed_series(times))
    x = {"0": nn.Identity()}
    timing = time_variants(model, layers, {"x": x}, workloads, 0.1)["x"]
    assert timing.runs == 5
    assert timing.median_ms == pytest.approx(18e-3)
    assert timing.by_workload == (0.5, 0.5, 0.5)


def test_a_workload_that_calls_no_searched_layer_has_no_ratio_of_its_own(monkeypatch):
    model, workloads = branches()
    layers = find_layers(model, workloads)
    noise = [{"dense": [10.0] * 5, "fixed": [2.0] * 5, "x": [6.0] * 5},
             {"dense": [1.0] * 5, "fixed": [0.9] * 5, "x": [3.0] * 5}]  # fmt: skip
    monkeypatch.setattr(model_latency, "interleave", fixed_series(noise))
    timing = time_variants(model, layers, {"x": {"image": nn.Identity()}}, workloads, 0.1)["x"]
    assert timing.by_workload == (0.5, None)
    assert timing.worst == 0.5
    # Layers that are called, but take no measurable time, have none either.
    noise[1]["fixed"] = [1.1] * 5
    layers = find_layers(model, [*workloads[:1], Workload("t", torch.randn(2, 64))])
    monkeypatch.setattr(model_latency, "interleave", fixed_series(noise))
    timing = time_variants(model, layers, {"x": {"image": nn.Identity()}}, workloads, 0.1)["x"]
    assert timing.by_workload == (0.5, None)


def test_a_variant_that_replaces_nothing_is_the_dense_model():
    task = ToyTask()
    model, workloads = task.model(), [Workload("w", task.workload())]
    layers = find_layers(model, workloads)
    timing = time_variants(model, layers, {"same": {}}, workloads, 0.05, 5, 5)["same"]
    assert (timing.ratio_layers, timing.ratio_model) == (1.0, 1.0)
    assert timing.ratio_layers_ci95 == (1.0, 1.0)
    assert timing.by_workload == (1.0,)


@pytest.mark.filterwarnings("error")
def test_layers_that_take_no_measurable_time_have_none_to_save():
    flat = {"dense": np.ones(5), "fixed": np.full(5, 1.1), "x": np.full(5, 0.9)}
    timing = model_latency._timing(flat, "x")
    assert (timing.ratio_layers, timing.ratio_layers_ci95) == (1.0, (1.0, 1.0))
    assert timing.ratio_model == pytest.approx(0.9)
    found = Decision(Contender("exact", {}, timing, 1.0, False), {}, 0.5, timing, 0, False)
    told = str(infeasible(Path("run"), "layers", 0.5, found, 0.0))
    assert "take no measurable part of the model's time: keep it dense" in told
    assert "smallest reachable budget is about 1.000" in told


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_multiply_adds_of_recurrent_layers_are_counted(kind: type[nn.Module], gates: int):
    model = nn.Sequential(kind(64, 64, batch_first=True)).eval()  # type: ignore[call-arg]
    counted = count_macs(model, [Workload("w", torch.randn(2, 20, 64))])
    assert counted == 2 * 20 * gates * 2 * 64 * 64


def test_an_uncertain_timing_of_models_goes_on(monkeypatch):
    rng, made = np.random.default_rng(0), []

    def series(noise: float):
        def some(calls, *rest, **more):
            made.append(noise)
            times = {"dense": 100.0, "fixed": 20.0, "same": 60.0}
            return {n: t * (1 + noise * rng.standard_normal(12)) for n, t in times.items()}

        return some

    task = ToyTask()
    model, workloads = task.model(), [Workload("w", task.workload())]
    layers = find_layers(model, workloads)
    same = {layer.name: model.get_submodule(layer.name) for layer in layers}
    monkeypatch.setattr(model_latency, "ATTEMPTS", 2)
    for noise, attempts in ((0.001, 1), (0.2, 2)):
        monkeypatch.setattr(model_latency, "interleave", series(noise))
        made.clear()
        timing = time_variants(model, layers, {"same": same}, workloads, 0.2)["same"]
        assert len(made) == attempts
        assert timing.runs == 12 * attempts
    assert timing.ratio_layers == pytest.approx(0.5, abs=0.15)
