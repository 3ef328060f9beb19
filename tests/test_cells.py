"""Measured cells beyond one run: merging tables, and the cache that runs share."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from toy import ToyTask

from blast_search import forecast, profiling
from blast_search.cellcache import SWITCH, code_digest, open_cache
from blast_search.errors import IncompatibleInputError, UsageError
from blast_search.prepared import prepare
from blast_search.profiling import Profiler
from blast_search.progress import SILENT
from blast_search.settings import Settings
from blast_search.space import Candidate, SearchSpace
from blast_search.tables import Cell, LatencyTable, Measurement, merge_files

CELL = Cell("d", "eager", "float32", "lowrank-1", 64, 64, True, 8, Candidate(1, 8))
STEADY = Measurement(10.0, 9.9, 10.1, 20, 20.0, 0.5, 0.499, 0.501)
NOISY = Measurement(11.0, 8.0, 19.0, 20, 22.0, 0.5, 0.4, 0.7)


def cell(rank: int) -> Cell:
    return replace(CELL, candidate=Candidate(1, rank))


def written(path: Path, cells: dict[Cell, Measurement | None]) -> Path:
    table = LatencyTable(next(iter(cells)).device, path)
    for key, measured in cells.items():
        table.add(key, measured, "ok" if measured else "failed: out of memory")
    return path


def test_merging_keeps_the_steadier_measurement_in_any_order(tmp_path: Path):
    a = written(
        tmp_path / "a.csv", {cell(1): STEADY, cell(2): None, cell(3): NOISY, cell(5): None}
    )
    b = written(tmp_path / "b.csv", {cell(1): NOISY, cell(2): NOISY, cell(4): STEADY})
    expected = {cell(1): STEADY, cell(2): NOISY, cell(3): NOISY, cell(4): STEADY, cell(5): None}
    assert merge_files([a, b], tmp_path / "ab.csv").cells == expected
    assert merge_files([b, a], tmp_path / "ba.csv").cells == expected
    for name in ("ab.csv", "ba.csv"):
        assert LatencyTable.open(tmp_path / name, "d").cells == expected
    assert LatencyTable.open(a, "d").merge(LatencyTable.open(a, "d")) == 0


def test_tables_of_two_devices_do_not_merge(tmp_path: Path):
    a = written(tmp_path / "a.csv", {CELL: STEADY})
    b = written(tmp_path / "b.csv", {replace(CELL, device="e"): STEADY})
    with pytest.raises(IncompatibleInputError, match="measured on device e"):
        merge_files([a, b], tmp_path / "c.csv")
    with pytest.raises(IncompatibleInputError, match="no measured cells"):
        merge_files([tmp_path / "none.csv"], tmp_path / "c.csv")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(SWITCH, "on")
    return tmp_path / "cache" / "blast-search" / "latency"


def test_cache_is_shared_by_fingerprint_and_can_be_off(cache: Path, monkeypatch):
    open_cache("d").add(CELL, STEADY)
    assert open_cache("d").cells == {CELL: STEADY}
    assert open_cache("e").cells == {}
    assert [p.name for p in cache.iterdir()] == [f"d-{code_digest()}.csv"]
    monkeypatch.setenv(SWITCH, "off")
    off = open_cache("d")
    assert off.cells == {}
    off.add(CELL, NOISY)
    monkeypatch.setenv(SWITCH, "on")
    assert open_cache("d").cells == {CELL: STEADY}
    monkeypatch.setenv(SWITCH, "maybe")
    with pytest.raises(UsageError, match="expected on or off"):
        open_cache("d")


def test_runs_that_append_to_the_cache_together_lose_nothing(cache: Path):
    with ThreadPoolExecutor(4) as pool:  # one open file each: the lock is between open files
        for start in range(4):
            table = open_cache("d")
            for rank in range(1 + start, 101, 4):
                pool.submit(table.add, cell(rank), STEADY)
    path = next(cache.iterdir())
    assert len(path.read_text().splitlines()) == 101
    assert set(open_cache("d").cells) == {cell(rank) for rank in range(1, 101)}


def test_a_second_run_copies_what_the_first_measured(cache: Path, tmp_path: Path, monkeypatch):
    space = SearchSpace(num_blocks=(1,), keep=(0.5,))
    settings = Settings(task="toy", budget=1.0, device="cpu")
    prepared = prepare(ToyTask(), settings, space)
    cells = prepared.cells()
    measured: list[Cell] = []

    def quick(todo, device_type, on_result, *args, **options):
        for one in todo:
            measured.append(one)
            on_result(one, STEADY, "ok")

    monkeypatch.setattr(profiling, "measure_cells", quick)

    def profile(name: str) -> LatencyTable:
        table = LatencyTable.open(tmp_path / name, prepared.fingerprint)
        Profiler(prepared, table, "local", None, SILENT).run("full")
        return table

    profile("first.csv")
    first = LatencyTable.open(tmp_path / "first.csv", prepared.fingerprint)
    assert measured == cells
    assert profile("second.csv").cells == first.cells
    assert measured == cells  # nothing was measured again
    copied = LatencyTable.open(tmp_path / "second.csv", prepared.fingerprint)
    assert copied.cells == first.cells  # to the digits on file: the run folder stands alone

    monkeypatch.setattr(forecast, "load_task", lambda name: ToyTask())
    monkeypatch.setattr(forecast, "load_space", lambda name: space)
    values = vars(settings) | {"out": None}
    known = forecast.forecast(values, SILENT, True)
    assert (known["cells"], known["cells_on_file"]) == (len(cells), 0)
    assert (known["cells_in_cache"], known["predicted_profile_minutes"]) == (len(cells), 0.0)
    shutil.rmtree(cache)
    assert forecast.forecast(values, SILENT, True)["cells_in_cache"] == 0
