"""Modes of timed calls: what is compiled or captured computes the same as the plain call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import ToyTask

import blast_search as bs
from blast_search import latency, modes
from blast_search.errors import IncompatibleInputError, UsageError
from blast_search.factorize import factorize
from blast_search.layers import Workload, inventory
from blast_search.model_latency import check_calls, time_variants, untrained
from blast_search.modes import check_mode, timed_call
from blast_search.space import Candidate, SearchSpace
from blast_search.tables import Cell

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


def test_unknown_modes_and_missing_devices_are_refused():
    check_mode("compiled", "cpu")
    check_mode("cuda-graph", "cuda")
    check_mode("eager-cold", "cpu")
    with pytest.raises(UsageError, match="needs a CUDA device"):
        check_mode("cuda-graph-cold", "cpu")
    with pytest.raises(UsageError, match="expected one of eager, compiled, cuda-graph"):
        check_mode("fast", "cpu")
    with pytest.raises(UsageError, match="needs a CUDA device"):
        check_mode("cuda-graph", "cpu")


@torch.inference_mode()
def test_compiled_variants_are_kept_apart_from_the_model():
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)
    dense, expected = model[0], model(x)
    first = timed_call("compiled", model, lambda m: m(x))
    model[0] = bs.BlastLinear(64, 64, 2, 8)
    second = timed_call("compiled", model, lambda m: m(x))
    other = model(x)
    model[0] = dense  # neither is changed by what the model becomes
    torch.testing.assert_close(first(), expected)
    torch.testing.assert_close(second(), other)
    assert not torch.allclose(expected, other)
    with torch.no_grad():
        dense.weight.zero_()  # weights are shared, not copied
    torch.testing.assert_close(first(), model(x))


def test_a_cold_cell_is_flushed_before_every_call(monkeypatch):
    flushed: list[str] = []
    real = modes.flusher

    def spy(mode, device):
        flush = real(mode, device)
        return lambda name: (flushed.append(name), flush(name))[1]

    monkeypatch.setattr(modes, "_cache_bytes", lambda device: 1 << 12)
    monkeypatch.setattr(latency, "flusher", spy)
    cell = Cell("d", "eager-cold", "float32", "k", 64, 64, True, 4, Candidate(1, 8))
    runs = latency.measure_cell(cell, "cpu", seconds=0.001).runs
    assert flushed.count("candidate") == flushed.count("dense") >= runs
    assert modes.flusher("eager", torch.device("cpu"))("dense") is None


def test_cache_size_is_known_or_assumed():
    assert modes._cache_bytes(torch.device("cpu")) >= 1 << 15


def test_whole_models_are_timed_compiled():
    task = ToyTask()
    model, workloads = task.model(), [Workload("w", task.workload())]
    layers, _ = inventory(model, workloads, SearchSpace())
    variants = {"b2": untrained(model, layers, {layers[0].name: Candidate(2, 16)})}
    timing = time_variants(model, layers, variants, workloads, 0.1, 5, 5, mode="compiled")["b2"]
    assert timing.runs == 5
    assert 0 < timing.fixed_ms < timing.dense_ms


def test_a_model_that_its_mode_cannot_take_is_refused_before_the_profile():
    class Reading(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 1e9 else self.missing(x)

    workloads = [Workload("some", torch.ones(2, 3))]
    check_calls(nn.Linear(3, 3), workloads, "compiled")
    check_calls(Reading(3, 3), workloads, "eager")  # which needs nothing beforehand
    with pytest.raises(IncompatibleInputError, match=r"'some' cannot be timed in mode compiled: "):
        check_calls(Reading(3, 3), workloads, "compiled")


def test_products_are_exact_whatever_autocast_says():
    weight = torch.randn(64, 64)
    wanted = factorize(weight, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = factorize(weight, 4, 8)
    assert torch.equal(found.U, wanted.U)
    assert found.error == wanted.error
    before = modes.float32_products()
    modes.set_float32_products("tf32")
    try:
        with modes.exact_products():
            assert modes.float32_products() == "ieee"
        assert modes.float32_products() == "tf32"
    finally:
        modes.set_float32_products(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_captured_calls_compute_the_same():
    model, x = nn.Linear(64, 64).cuda(), torch.randn(4, 64, device="cuda")
    call = timed_call("cuda-graph", model, lambda m: m(x))
    expected = model(x)
    torch.testing.assert_close(call(), expected)


def test_graph_cells_are_timed_by_the_device_behind_a_delay(monkeypatch):
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other) -> float:
            return 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("delay"))
    assert modes.device_timer("eager") is None
    timed = modes.device_timer("cuda-graph")
    assert timed is not None
    flush = modes.flusher("cuda-graph", torch.device("cpu"))
    calls = {"a": lambda: log.append("call")}
    times = latency.interleave(calls, lambda: None, 0.0, 1, 1, prepare=flush, timed=timed)
    assert times["a"].tolist() == [250.0]
    assert log[-5:] == ["delay", "record", "call", "record", "wait"]
