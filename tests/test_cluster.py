"""Profiling on a Ray cluster of several nodes on this machine: Ray's own test cluster."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

import blast_search
from blast_search import cluster, trainable, workers
from blast_search.errors import BlastSearchError
from blast_search.latency import fingerprint, measure_cell
from blast_search.space import Candidate
from blast_search.tables import Cell, LatencyTable

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers lack this file
LOG = "MEASURE_LOG"  # where workers note what they do
DEADLY = 48  # width of the layer whose measurement kills its worker


def measure_and_log(cell: Cell, device_type: str):
    def note(what: str) -> None:
        node = ray.get_runtime_context().get_node_id()
        code = blast_search.__file__
        line = json.dumps({"what": what, "cell": cell.in_features, "node": node, "code": code})
        with open(os.environ[LOG], "a") as stream:
            stream.write(line + "\n")

    note("begin")
    if cell.in_features == DEADLY:
        os._exit(1)  # as the kernel's out-of-memory killer would
    measured = measure_cell(cell, device_type, seconds=0.01)
    time.sleep(0.2)  # time to be killed in
    note("end")
    return measured


def read_log(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three nodes with the resource "prof"; the head is another kind of device."""
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    monkeypatch.chdir(tmp_path)  # Ray's workers also look for modules in the driver's folder
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "env_vars": {"ATEN_CPU_CAPABILITY": "default"},  # no vector code: another device
            "resources": {"prof": 1},
            "include_dashboard": False,
            "_system_config": quick,
        },
    )
    for resources in ({"prof": 1, "a": 1}, {"prof": 1, "b": 1}):
        made.add_node(resources=resources)
    yield made
    made.shutdown()


def grid(count: int) -> list[Cell]:
    device = fingerprint(cluster.describe("cpu", "float32"))
    return [
        Cell(device, "eager", "float32", "lowrank", 64, 8 * i, True, 4, Candidate(1, 4))
        for i in range(1, count + 1)
    ]


@pytest.mark.slow
def test_every_cell_once_though_a_node_and_workers_die(nodes: Cluster, tmp_path, monkeypatch):
    cells = grid(12)
    table = LatencyTable(cells[0].device, tmp_path / "latency.csv")
    arrived: dict[int, list[str]] = {}
    said: list[str] = []
    killed: list[str] = []

    def record(cell, measured, status):
        table.add(cell, measured, status)
        arrived.setdefault(cell.in_features, []).append(status)
        if len(arrived) == 4 and not killed:  # a node that is measuring
            last = read_log(tmp_path / "log")[-1]["node"]
            node = next(n for n in nodes.worker_nodes if n.node_id == last)
            killed.append(last)
            nodes.remove_node(node, allow_graceful=False)

    with cluster.attached(nodes.address):
        alive = ray.nodes()
        monkeypatch.setenv(cluster.RESOURCE, "H100")
        with pytest.raises(BlastSearchError, match=r"RESOURCE=H100: no node offers one"):
            cluster.places(cells[0].device, "float32", "cpu", said.append)
        monkeypatch.setenv(cluster.RESOURCE, "prof")
        workers.measure_cells(
            cells, "cpu", record, "ray", measure=measure_and_log, say=said.append
        )
        log = read_log(tmp_path / "log")

        # A worker on a device of another kind refuses, whoever sent it there.
        head = next(n["NodeID"] for n in alive if "node:__internal_head__" in n["Resources"])
        with pytest.raises(BlastSearchError, match="not the device that this run measures"):
            trainable.run(
                cells[:1], "cpu", record, cluster.Places({"CPU": 1}, (head,)), measure_and_log
            )

    # Each cell arrived once and is on file once, the deadly one as a failure.
    assert {c: len(s) for c, s in arrived.items()} == {c.in_features: 1 for c in cells}
    failed = {c: s for c, [s] in arrived.items() if s != "ok"}
    assert set(failed) == {DEADLY}
    assert failed[DEADLY].startswith("failed: the worker died each time")
    again = LatencyTable.open(tmp_path / "latency.csv", table.device)
    assert set(again.cells) == set(cells)
    assert len((tmp_path / "latency.csv").read_text().splitlines()) == 1 + len(cells)

    # Measured on the nodes that were chosen, by the code that was shipped, no cell twice except
    # what the killed node was busy with.
    [left_out] = said
    assert left_out.startswith("measuring on 2 nodes of the Ray cluster; not on: ")
    chosen = {n["NodeID"] for n in alive if {"a", "b"} & set(n["Resources"])}
    assert {row["node"] for row in log} == chosen
    assert set(killed) < chosen
    assert all("runtime_resources" in row["code"] for row in log)
    begun = Counter(row["cell"] for row in log if row["what"] == "begin")
    # Attempts that the dying node took, or whose worker did not come up, have not begun.
    assert begun.pop(DEADLY, 0) <= 3
    assert sum(begun.values()) <= len(cells) - 1 + 1
