"""Random plans, the fit of the latency model, and the error on plans outside the fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import ToyTask

from blast_search.latency import cells_for
from blast_search.latency_model import LatencyModel, fit_factors
from blast_search.layers import Workload, inventory
from blast_search.plan_check import (
    CHECKED,
    CheckedPlan,
    check_text,
    correction,
    cross_validated,
    measure_plans,
    random_plans,
)
from blast_search.progress import SILENT
from blast_search.runfolder import RunFolder
from blast_search.space import SearchSpace
from blast_search.tables import LatencyTable, Measurement

SPACE = SearchSpace(num_blocks=(1, 2, 4), keep=(0.1, 0.3, 0.6))


@pytest.fixture(scope="module")
def toy():
    task = ToyTask()
    model = task.model()
    workloads = [Workload("w", task.workload())]
    layers, _ = inventory(model, workloads, SPACE)
    table = LatencyTable("d")
    for cell in cells_for(layers, SPACE, "d", torch.float32, "cpu"):
        c = cell.candidate
        ratio = 1.0 if c.is_dense else 0.1 + 0.005 * c.rank
        table.add(cell, Measurement(1, 1, 1, 9, 100.0, ratio, ratio, ratio))
    return model, workloads, LatencyModel(layers, table)


def checked(latency: LatencyModel, factors: dict[int, float], noise: float) -> list[CheckedPlan]:
    """Plans on a device whose layers take `factors` times their cells inside the model."""
    draw = np.random.default_rng(3)
    found = []
    for plan in random_plans(latency, 24, 0):
        shares = latency.shares(plan)
        assert shares is not None
        ratio = sum(share * factors.get(b, 1.0) for b, share in shares.items())
        ratio *= 1 + noise * draw.standard_normal()
        found.append(CheckedPlan(plan, shares, ratio, 10 + 90 * ratio, 100.0, 10.0))
    return found


def test_random_plans_cover_the_range_and_repeat_for_a_seed(toy):
    latency = toy[2]
    plans = random_plans(latency, 24, 0)
    assert plans == random_plans(latency, 24, 0) != random_plans(latency, 24, 1)
    ratios = sorted(latency.ratio(plan) for plan in plans)
    assert ratios[0] < 0.35
    assert ratios[-1] > 0.7
    assert {c.num_blocks for plan in plans for c in plan.values()} == {0, 1, 2, 4}


def test_the_fit_recovers_what_blocks_really_take(toy):
    real = {1: 1.3, 2: 0.9, 4: 1.1}
    plans = checked(toy[2], real, 0.0)
    fitted = fit_factors([(c.shares, c.measured_ratio_layers) for c in plans])
    assert fitted == pytest.approx(real, abs=0.03)
    errors = cross_validated(plans)
    assert errors["plans"] == 24
    assert errors["worst"] < 0.02 < errors["uncorrected_worst"]
    assert errors["corrected"] == 1.0
    assert correction(plans) == fitted


def test_an_unused_block_count_keeps_its_cells(toy):
    plans = [({0: 0.5, 1: 0.3, 2: 1e-6}, 0.9)] * 5
    fitted = fit_factors(plans)
    assert fitted[2] == pytest.approx(1.0, abs=0.01)
    assert fitted[1] > 1.2
    assert fit_factors([({0: 1.0}, 1.0)]) == {}


def test_a_fit_to_noise_is_not_used(toy):
    # Nothing to learn but noise: a fit that saw its own plans would look better than it is.
    plans = checked(toy[2], {}, 0.2)
    errors = cross_validated(plans)
    assert errors["corrected"] == 0.0
    assert errors["median"] == errors["uncorrected_median"]
    assert correction(plans) == {}
    assert cross_validated([]) == {}
    assert correction([]) == {}


def test_plans_are_timed_once_and_found_again(toy, tmp_path):
    model, workloads, latency = toy
    records = RunFolder.open(tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = measure_plans(model, latency, workloads, records, SILENT, count=5)
    assert len(first) == 5
    assert all(c.measured_ms > 0 and c.fixed_ms < c.dense_ms for c in first)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    again = measure_plans(model, latency, workloads, RunFolder.open(tmp_path), SILENT, count=5)
    assert again == first
    assert set(CHECKED) <= set(cross_validated(first))
    assert "On 5 random plans outside the fit" in check_text(cross_validated(first))


def test_a_time_limit_means_fewer_plans(toy, tmp_path):
    model, workloads, latency = toy
    records = RunFolder.open(tmp_path)
    assert measure_plans(model, latency, workloads, records, SILENT, expired=lambda: True) == []
