"""Does every run meet its budget, and how much of it is left unused?

    python benchmarks/budgets.py vit --runs 20      # repeat to add runs; a quiet machine
    python benchmarks/budgets.py examples.own_task:task

Whole searches without retraining, over seeds and budgets.  A run's own claim is its final timing
(40 s, side by side with dense); then the saved model is timed again as `blast-search verify` does
it, which the run knew nothing of.  Rows go to results/budgets/<task>.csv, the summary to
README.md beside it; cells measured by one run serve the next ones (BLAST_SEARCH_CACHE=on).
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from blast_search import search
from blast_search.errors import InfeasibleBudgetError
from blast_search.files import append_row
from blast_search.latency import environment
from blast_search.plan import Plan
from blast_search.progress import SILENT
from blast_search.saved import verify

FOLDER = Path(__file__).resolve().parent.parent / "results" / "budgets"
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7)
VERIFY_SECONDS = 20.0
FIELDS = (
    "seed", "budget", "met", "ratio", "ci_low", "ci_high", "slack", "verified_ratio",
    "verified_low", "verified_high", "verdict", "seconds", "date",
)  # fmt: skip


def one(task: str, seed: int, budget: float, trials: int) -> dict[str, Any]:
    began, row = time.monotonic(), dict.fromkeys(FIELDS, "") | {"seed": seed, "budget": budget}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        try:
            search(task, budget, trials=trials, retrain_steps=0, seed=seed, out=folder)
        except InfeasibleBudgetError as error:
            row |= {"met": 0, "verdict": str(error)}
        plan = Plan.load(folder / "plan.json")
        ratio = float(plan.measured["latency_ratio_layers"])
        row |= {"ratio": round(ratio, 4)}
        if not row["verdict"]:
            low, high = plan.measured["latency_ratio_layers_ci95"]
            timing = verify(folder / "model", task, VERIFY_SECONDS, SILENT, silent=True)["timing"]
            again = [timing["ratio_layers"], *timing["ratio_layers_ci95"]]
            names = ("verified_ratio", "verified_low", "verified_high")
            row |= {
                "met": int(plan.measured["met_budget"]), "slack": round(1 - ratio / budget, 4),
                "ci_low": round(low, 4), "ci_high": round(high, 4),
                "verdict": plan.search["verdict"],
            } | {n: round(v, 4) for n, v in zip(names, again, strict=True)}  # fmt: skip
    return row | {
        "seconds": round(time.monotonic() - began),
        "date": datetime.now(UTC).date().isoformat(),
    }


def summary() -> str:
    lines = [
        "# Budgets met, as measured",
        "",
        "Written by `python benchmarks/budgets.py TASK`; every run is a row of <task>.csv.",
        "",
    ]
    for file in sorted(FOLDER.glob("*.csv")):
        rows = list(csv.DictReader(file.open()))
        met = [row for row in rows if row["met"] == "1"]
        slack = [float(row["slack"]) for row in met]
        over = [float(r["verified_ratio"]) / float(r["budget"]) - 1 for r in met]
        certain = sum(float(r["verified_low"]) > float(r["budget"]) for r in met)
        lines += [
            f"## {file.stem}", "",
            f"{len(met)} of {len(rows)} runs met their budget by their own final timing; of it "
            f"they left {median(slack):.1%} unused (median; {min(slack):.1%} to "
            f"{max(slack):.1%}).  Timed again as `verify` does it, the ratio was "
            f"{median(over):+.1%} of the budget away from it (median; {min(over):+.1%} to "
            f"{max(over):+.1%}), above it in {sum(v > 0 for v in over)} runs, in {certain} of "
            "them with the whole 95 % "
            "interval.", "",
        ]  # fmt: skip
    env = environment(torch.device("cpu"))
    lines.append(f"{env['device']} ({env['threads']} threads, float32), torch {env['torch']}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, help="of the first run; default: the next new one")
    values = parser.parse_args()
    name = values.task.partition(":")[0].rpartition(".")[2]  # examples.own_task:task -> own_task
    file = FOLDER / f"{name}.csv"
    FOLDER.mkdir(parents=True, exist_ok=True)
    first = values.seed
    if first is None:
        first = len(list(csv.DictReader(file.open()))) if file.exists() else 0
    for seed in range(first, first + values.runs):
        row = one(values.task, seed, BUDGETS[seed % len(BUDGETS)], values.trials)
        append_row(file, FIELDS, row)
        (FOLDER / "README.md").write_text(summary())
        print(row, flush=True)


if __name__ == "__main__":
    main()
