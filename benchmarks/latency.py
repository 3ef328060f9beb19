"""Can the latency table be believed?  Measured twice, under load, summed up, and pruned.

    python benchmarks/latency.py minilm --out results/latency           # all parts
    python benchmarks/latency.py smollm2 --out results/latency --parts plans pruned

table    one table measured twice: how far cells move; the noise that the run itself reports
loaded   some cells while other programs take the processors: are they reported as noisy?
plans    predicted against measured model latency on 30 random plans outside the fit
pruned   cells of a pruned profile, and whether the exact plans stay the same

Writes OUT/<task>.json (figures with environment and date), OUT/<task>.csv (the random plans) and
OUT/<task>-cells.csv (the first table, which later parts reuse).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from blast_search import solver
from blast_search.files import write_json, write_rows
from blast_search.latency import measure_cell, missing_cells
from blast_search.latency_model import LatencyModel
from blast_search.layers import dense_weight
from blast_search.noise import table_noise
from blast_search.plan_check import cross_validated, measure_plans
from blast_search.prepared import Prepared, prepare
from blast_search.progress import Reporter
from blast_search.pruning import promising_cells, seed_cells
from blast_search.runfolder import RunFolder
from blast_search.settings import Settings
from blast_search.space import load_space
from blast_search.tables import Cell, LatencyTable, Score, ScoreTable, layer_options
from blast_search.tasks import load_task

PARTS = ("table", "loaded", "plans", "pruned")
LOADED_CELLS = 12
PLANS = 30
BUDGETS = (0.3, 0.5, 0.7)
GAINS = {2: 0.95, 4: 0.9, 8: 0.85}  # of b > 1 over low rank, a stand-in for fitted ones
SPIN = "while True: pass"


def measure(cells: list[Cell], fingerprint: str, path: Path | None = None) -> LatencyTable:
    """The table of cells; those in the file at `path` are not measured again."""
    table = LatencyTable.open(path, fingerprint) if path else LatencyTable(fingerprint)
    for cell in missing_cells(table, cells):
        table.add(cell, measure_cell(cell, "cpu"))
    return table


def repeat(first: LatencyTable, again: LatencyTable) -> dict[str, Any]:
    """How far the cells moved between two measurements of one table."""
    moved = [
        abs(again.cells[cell].ratio / m.ratio - 1)  # type: ignore[union-attr]
        for cell, m in first.cells.items()
        if m and not cell.candidate.is_dense
    ]
    return {
        "cells": len(moved),
        "median_deviation": float(np.median(moved)),
        "p90_deviation": float(np.percentile(moved, 90)),
        "worst_deviation": float(np.max(moved)),
        "noise": [asdict(n) | {"noisy": n.noisy} for n in map(_noise, (first, again))],
    }


def _noise(table: LatencyTable) -> Any:
    return table_noise(table.cells)


def loaded(cells: list[Cell], fingerprint: str) -> dict[str, Any]:
    """Some cells beside two programs that never rest, and the same cells without them."""
    some = random.Random(0).sample(cells, min(LOADED_CELLS, len(cells)))
    with ExitStack() as stack:
        for _ in range(2):
            program = stack.enter_context(subprocess.Popen([sys.executable, "-c", SPIN]))
            stack.callback(program.kill)
        time.sleep(0.5)
        busy = _noise(measure(some, fingerprint))
    quiet = _noise(measure(some, fingerprint))
    return {
        name: asdict(n) | {"noisy": n.noisy, "text": n.text}
        for name, n in (("busy", busy), ("quiet", quiet))
    }


def spectral_scores(prepared: Prepared) -> ScoreTable:
    """Squared relative truncation errors of the weights, by rank: a stand-in for real scores."""
    table = ScoreTable()
    for layer in prepared.layers:
        weight = dense_weight(prepared.model.get_submodule(layer.name)).float()
        energy = np.square(np.linalg.svd(weight.numpy(), compute_uv=False)).astype(float)
        tail = 1 - np.cumsum(energy) / energy.sum()
        table.scores[layer.name] = {}
        for c in prepared.space.candidates(layer):
            if not c.is_dense:
                loss = float(max(tail[min(c.rank, len(tail)) - 1], 0.0))
                loss *= GAINS.get(c.num_blocks, 1.0) ** 2
                table.scores[layer.name][c] = Score(loss**0.5, loss)
    return table


def pruned(prepared: Prepared, full: LatencyTable) -> dict[str, Any]:
    """What a pruned profile would have measured of a full table, and the exact plans of both.

    Both have the full table's times, so that only what was left out can make a difference.
    """
    cells, space = prepared.cells(), prepared.space
    table = LatencyTable(full.device)
    for cell in seed_cells(cells):
        table.add(cell, full.cells[cell])
    seeds = len(table.cells)
    for cell in promising_cells(prepared.layers, cells, table):
        table.add(cell, full.cells[cell])
    naive = sum(len(space.candidates(ly)) * len(ly.calls) for ly in prepared.layers)
    scores = spectral_scores(prepared)
    same = {}
    model = LatencyModel(prepared.layers, full)
    options = layer_options(prepared.layers, model.costs, scores)
    measured = {ly.name: set(table.costs(ly)) for ly in prepared.layers}
    left = {n: [o for o in found if o.candidate in measured[n]] for n, found in options.items()}
    dense_us = model.dense_us
    for budget in BUDGETS:
        whole, part = (solver.solve(o, budget * dense_us).choices for o in (options, left))
        same[str(budget)] = whole == part
    return {
        "naive_cells": naive,
        "distinct_cells": len(cells),
        "seed_cells": seeds,
        "measured_cells": len(table.cells),
        "share_of_naive": len(table.cells) / naive,
        "same_plan": same,
    }


def plans(prepared: Prepared, table: LatencyTable, csv: Path) -> dict[str, float]:
    latency = LatencyModel(prepared.layers, table)
    with tempfile.TemporaryDirectory() as folder:
        checked = measure_plans(
            prepared.model, latency, prepared.workloads, RunFolder.open(Path(folder)),
            Reporter(1), count=PLANS,
        )  # fmt: skip
    rows = [
        {
            "plan": i,
            "cells_sum_ratio": f"{sum(c.shares.values()):.5f}",
            "measured_ratio_layers": f"{c.measured_ratio_layers:.5f}",
            "measured_ms": f"{c.measured_ms:.4f}",
            "dense_ms": f"{c.dense_ms:.4f}",
            "fixed_ms": f"{c.fixed_ms:.4f}",
        }
        | {f"share_b{b}": f"{c.shares.get(b, 0.0):.5f}" for b in (0, 1, 2, 4, 8)}
        for i, c in enumerate(checked)
    ]
    write_rows(csv, tuple(rows[0]), rows)
    return cross_validated(checked)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("task")
    parser.add_argument("--out", type=Path, default=Path("results/latency"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    task = load_task(args.task)
    prepared = prepare(task, Settings(task=args.task, budget=1.0), load_space("default"))
    cells, mine = prepared.cells(), prepared.fingerprint
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.task}.json"
    result = json.loads(file.read_text()) if file.is_file() else {}
    result |= {
        "task": args.task,
        "environment": prepared.environment,
        "date": datetime.now(UTC).date().isoformat(),
        "workload": [[w.name, w.weight] for w in prepared.workloads],
    }
    began = time.monotonic()
    first = measure(cells, mine, args.out / f"{args.task}-cells.csv")
    if "table" in args.parts:
        result["table_seconds"] = round(time.monotonic() - began, 1)
    result["noise"] = asdict(_noise(first)) | {"text": _noise(first).text}
    parts: dict[str, Callable[[], Any]] = {
        "table": lambda: repeat(first, measure(cells, mine)),
        "loaded": lambda: loaded(cells, mine),
        "pruned": lambda: pruned(prepared, first),
        "plans": lambda: plans(prepared, first, file.with_suffix(".csv")),
    }
    for part in args.parts:
        result[part] = parts[part]()
        write_json(file, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
