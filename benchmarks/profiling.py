"""Profiling on Ray under kill signals, and how it scales over nodes.

    python benchmarks/profiling.py kills --mode ray      # repeat: pieces add up in kills.csv
    python benchmarks/profiling.py kills --mode local
    python benchmarks/profiling.py scaling

Both measure with `simulated` (a sleep of fixed length) handed to the same `measure_cells` that
profiling uses, on Ray's own test cluster of several nodes on this machine.  `kills` sends SIGKILL
to the driver or to the worker that is measuring, at random moments, starts the driver again until
every cell is on file, and checks after each kill that nothing on file was lost, doubled or
measured again.  Results: results/profiling/.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from ray import cloudpickle

from blast_search import cluster
from blast_search.files import append_row, write_json
from blast_search.latency import environment, fingerprint, missing_cells
from blast_search.space import DENSE
from blast_search.tables import Cell, LatencyTable, Measurement
from blast_search.workers import measure_cells

FOLDER = Path(__file__).resolve().parent.parent / "results" / "profiling"
LOG, SECONDS = "PROFILING_LOG", "PROFILING_SECONDS"
RUN_FIELDS = (
    "mode", "seed", "cells", "driver_kills", "worker_kills", "lost", "doubled", "measured_again",
    "finished_but_unrecorded", "failed", "same_cells", "wall_s", "date",
)  # fmt: skip


def simulated(cell: Cell, device_type: str) -> Measurement:
    """Takes a fixed time, and notes begin and end: time, process, cell."""
    seconds = float(os.environ[SECONDS])
    note("begin", cell)
    time.sleep(seconds)
    note("end", cell)
    us = seconds * 1e6
    return Measurement(us, us, us, 1, us, 1.0, 1.0, 1.0)


def note(what: str, cell: Cell) -> None:
    line = f"{what} {time.time():.6f} {os.getpid()} {cell.in_features}\n"
    with open(os.environ[LOG], "a") as stream:
        stream.write(line)


def read_log(path: Path) -> list[tuple[str, float, int, int]]:
    text = path.read_text() if path.exists() else ""
    words = [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]
    return [(what, float(at), int(pid), int(cell)) for what, at, pid, cell in words]


def grid(count: int) -> list[Cell]:
    device = fingerprint(cluster.describe("cpu", "float32"))
    return [
        Cell(device, "eager", "float32", "dense", 64, i, True, 8, DENSE)
        for i in range(1, count + 1)
    ]


def drive(folder: Path, count: int, mode: str, address: str | None) -> None:
    """One life of a driver: measure what is not on file."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    cells = grid(count)
    table = LatencyTable.open(folder / "latency.csv", cells[0].device)
    missing = missing_cells(table, cells)
    measure_cells(missing, "cpu", table.add, mode, address, measure=simulated, say=print)


def test_cluster(nodes: int) -> Any:
    """A head without CPUs for measuring, and `nodes` nodes with one each.

    They inherit the environment (LOG, SECONDS) of this process.
    """
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    for _ in range(nodes):
        made.add_node(num_cpus=1)
    return made


def keys(folder: Path) -> list[str]:
    """The cells on file, in order, a torn last line left out."""
    path = folder / "latency.csv"
    text = path.read_text() if path.exists() else ""
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [f"{row['device']} {row['in_features']}" for row in rows]


def start(folder: Path, count: int, mode: str, address: str | None) -> Any:
    """A driver in a process of its own, forked from one that has the imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blast_search.trainable"])
    driver = context.Process(target=drive, args=(folder, count, mode, address))
    driver.start()
    return driver


def disturbed_run(
    mode: str, address: str | None, count: int, seed: int, until: float
) -> dict[str, Any]:
    """One run of `count` cells, killed at random moments up to `until`, to its end."""
    chance, began = random.Random(seed), time.monotonic()
    result: dict[str, Any] = dict.fromkeys(RUN_FIELDS, 0) | {
        "mode": mode, "seed": seed, "cells": count,
    }  # fmt: skip
    log = Path(os.environ[LOG])
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder, code = Path(name), None
        while code != 0:
            before, seen = keys(folder), len(read_log(log))
            driver = start(folder, count, mode, address)
            code = disturb(driver, folder, log, mode, chance, result, until)
            after = keys(folder)
            known = {int(key.split()[1]) for key in before}
            result["lost"] += len(set(before) - set(after)) + (after[: len(before)] != before)
            result["doubled"] += len(after) - len(set(after))
            begun = [cell for what, _, _, cell in read_log(log)[seen:] if what == "begin"]
            result["measured_again"] += sum(cell in known for cell in begun)
            if code not in (0, -signal.SIGKILL):
                raise SystemExit(f"the driver ended with {code}")
        wanted = [f"{cell.device} {cell.in_features}" for cell in grid(count)]
        text = (folder / "latency.csv").read_text()
        result["same_cells"] = int(sorted(keys(folder)) == sorted(wanted))
        result["failed"] = text.count(",failed")
        ends = sum(what == "end" for what, *_ in read_log(log))
        result["finished_but_unrecorded"] = ends - (count - result["failed"])
    result |= {"wall_s": round(time.monotonic() - began, 1), "date": now()}
    return result


def disturb(
    driver: Any,
    folder: Path,
    log: Path,
    mode: str,
    chance: random.Random,
    result: dict[str, Any],
    until: float,
) -> int:
    """Kill workers, then the driver, at random moments; the driver's exit code.

    The driver dies while it starts, attaches and waits for workers (a third of the time), or some
    cells later; the worker that measures dies up to ten times in a driver's life.
    """
    at_start = chance.random() < 1 / 3
    delay = chance.uniform(0, (1 if mode == "local" else 8) if at_start else 0.3)
    cells = 0 if at_start else chance.randint(1, 4 if mode == "local" else 25)
    deaths: Counter[int] = Counter()
    had, worker_at = len(keys(folder)), chance.randint(0, 3)
    while (code := driver.exitcode) is None:
        if time.monotonic() > until:
            driver.join()
            continue
        done = len(keys(folder)) - had
        if done >= cells:
            driver.join(delay)
            driver.kill()
            driver.join()
            result["driver_kills"] += driver.exitcode == -signal.SIGKILL
            return int(driver.exitcode)
        time.sleep(chance.uniform(0, 0.1))
        pid, cell = measuring(log)
        # A third death of a cell's worker would be recorded as the cell's failure, by design.
        due = mode == "ray" and done >= worker_at and deaths.total() < 10 and deaths[cell] < 2
        if due and pid and driver.is_alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                deaths[cell] += 1
                result["worker_kills"] += 1
                worker_at = done + chance.randint(0, 4)
        driver.join(chance.uniform(0.02, 0.2))
    return int(code)


def measuring(log: Path) -> tuple[int, int]:
    """A worker that has begun a cell and not ended it, and the cell; zeros if there is none."""
    begun = {}
    for what, at, pid, cell in read_log(log):
        if what == "begin":
            begun[pid] = (at, cell)
        else:
            begun.pop(pid, None)
    recent = [(pid, cell) for pid, (at, cell) in begun.items() if time.time() - at < 1]
    return recent[-1] if recent else (0, 0)


def kills(mode: str, seconds: float, cells: int) -> None:
    os.environ |= {SECONDS: "0.1"}
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "kills.csv"
    seed = len(path.read_text().splitlines()) if path.exists() else 1
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        os.environ[LOG] = f"{name}/log"
        made = test_cluster(2) if mode == "ray" else None
        try:
            while time.monotonic() < until:
                row = disturbed_run(mode, made and made.address, cells, seed, until)
                append_row(path, RUN_FIELDS, row)
                print(row, flush=True)
                seed += 1
        finally:
            if made:
                made.shutdown()
    rows = list(csv.DictReader(path.open()))
    total: dict[str, Any] = {k: sum(int(row[k]) for row in rows) for k in RUN_FIELDS[2:11]}
    total |= {"runs": len(rows), "kills": total["driver_kills"] + total["worker_kills"]}
    total["driver_kills_by_mode"] = {
        m: sum(int(row["driver_kills"]) for row in rows if row["mode"] == m)
        for m in ("ray", "local")
    }
    write_json(FOLDER / "kills.json", total | about())
    print(total)


def scaling(count: int, seconds: float) -> None:
    os.environ |= {SECONDS: str(seconds)}
    results = []
    for nodes in (1, 2, 3):
        with tempfile.TemporaryDirectory() as name:
            os.environ[LOG] = f"{name}/log"
            made = test_cluster(nodes)
            try:
                began = time.time()
                drive(Path(name), count * nodes, "ray", made.address)
                wall = time.time() - began
            finally:
                made.shutdown()
            results.append(scaled(read_log(Path(os.environ[LOG])), nodes, seconds, began, wall))
            print(results[-1], flush=True)
        FOLDER.mkdir(parents=True, exist_ok=True)
        file = FOLDER / "scaling.json"
        write_json(file, {"seconds_per_cell": seconds, "runs": results} | about())


def scaled(
    log: list[tuple[str, float, int, int]], nodes: int, seconds: float, began: float, wall: float
) -> dict[str, Any]:
    """Overhead per cell, from one cell's end to the same worker's next begin, and efficiency.

    `efficiency` is the share of time spent measuring while all workers were at work; the start
    (attach, ask the nodes, start workers) is `start_s`, and `whole_call_efficiency` counts it.
    """
    gaps, busy, last_end = [], {}, {}
    for what, at, pid, _ in log:
        if what == "begin" and pid in last_end:
            gaps.append(at - last_end[pid])
        elif what == "begin":
            busy[pid] = at
        else:
            last_end[pid] = at
    cells = sum(what == "end" for what, *_ in log)
    start, stop = max(busy.values()), min(last_end.values())
    inside = sum(what == "end" and start <= at <= stop for what, at, _, _ in log)
    return {
        "nodes": nodes, "workers": len(busy), "cells": cells,
        "overhead_s": {"median": round(median(gaps), 4), "mean": round(mean(gaps), 4),
                       "worst": round(max(gaps), 4)},
        "efficiency": round(seconds * inside / (nodes * (stop - start)), 3),
        "start_s": round(min(busy.values()) - began, 1), "wall_s": round(wall, 1),
        "whole_call_efficiency": round(cells * seconds / (nodes * wall), 3),
        "load_average": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def now() -> str:
    return datetime.now(UTC).date().isoformat()


def about() -> dict[str, Any]:
    import ray

    return {
        "nodes": "Ray's test cluster, all nodes on one machine", "ray": ray.__version__,
        "environment": environment(torch.device("cpu")), "date": now(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("kills")
    verb.add_argument("--mode", choices=("ray", "local"), default="ray")
    verb.add_argument("--seconds", type=float, default=100, help="no kills after these")
    verb.add_argument("--cells", type=int, default=30)
    verb = verbs.add_parser("scaling")
    verb.add_argument("--cells", type=int, default=40, help="per node")
    verb.add_argument("--seconds", type=float, default=0.4)
    values = vars(parser.parse_args())
    if values.pop("verb") == "kills":
        kills(**values)
    else:
        scaling(values["cells"], values["seconds"])


if __name__ == "__main__":
    main()
