"""Intervals, other load, the verdict on a table: with numbers made for the purpose."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from blast_search import noise
from blast_search.noise import OtherLoad, half_width, median_interval, table_noise
from blast_search.space import DENSE, Candidate
from blast_search.tables import Cell, Measurement


def test_the_interval_holds_the_median_as_often_as_it_says():
    draws = np.random.default_rng(0).lognormal(0, 0.3, (2000, 25))
    inside = [low <= 1.0 <= high for low, high in map(median_interval, draws)]
    assert 0.94 <= np.mean(inside) <= 0.99


def test_the_interval_narrows_and_survives_few_samples():
    values = np.random.default_rng(1).normal(100, 5, 400)
    assert half_width(median_interval(values)) < half_width(median_interval(values[:40]))
    assert median_interval(np.array([3.0])) == (3.0, 3.0)
    assert median_interval(np.array([2.0, 1.0])) == (1.0, 2.0)


def cell(rank: int) -> Cell:
    candidate = Candidate(1, rank) if rank else DENSE
    return Cell("d", "eager", "float32", "k", 64, 64, True, 8, candidate)


def table(half: float, twins: list[float], load: float = 0.0) -> dict[Cell, Measurement | None]:
    return {
        cell(rank): Measurement(50, 49, 51, 20, dense, 0.5, 0.5 - half / 2, 0.5 + half / 2, load)
        for rank, dense in enumerate(twins)
    }


def test_steady_and_noisy_tables_are_told_apart():
    steady = table_noise(table(0.01, [100.0] * 10))
    assert not steady.noisy
    assert steady.text.startswith("Steady timings: 0 of 10 cells")
    wide = table_noise(table(0.08, [100.0] * 10, load=0.4))
    assert wide.noisy
    assert wide.noisy_cells == 10
    assert "up to 40% of the processors: stop them" in wide.text
    drifting = table_noise(table(0.01, [100.0] * 6 + [140.0] * 4))
    assert drifting.noisy
    assert "fix its clocks" in drifting.text  # no other load was seen
    assert not table_noise({cell(0): None}).noisy


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_other_load_sees_another_program_and_not_ourselves():
    spin = "import time; end = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"
    load = OtherLoad()
    own = time.process_time()
    with subprocess.Popen([sys.executable, "-c", spin]) as program:
        program.wait()
    other = load.share()
    assert time.process_time() - own < 0.5
    assert other > 0.5 / noise.processors()


def test_what_disturbs_a_gpu_is_said():
    quiet = {"processes": 0, "sm_clock_mhz": [1980.0]}
    assert noise.gpu_text(quiet, quiet) == noise.gpu_text({}, {}) == ""
    text = noise.gpu_text(quiet | {"processes": 2}, {"processes": 3, "sm_clock_mhz": [1400.0]})
    assert "2 other programs" in text
    assert "from 1980 to 1400 MHz" in text


def test_gpu_state_without_a_gpu_is_empty_or_numbers():
    state = noise.gpu_state()
    assert state == {} or set(state) == {"processes", "sm_clock_mhz"}
