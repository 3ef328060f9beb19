"""What the trials of a search bring at equal predicted latency: weights, steps, moves.

    python benchmarks/trials.py minilm 0.3 0.5 0.7
    python benchmarks/trials.py vit 0.3 0.5 0.7

Cells, probes and random plans are measured once per task; then, for every budget, the trials run
with several shares of weights, steps and moves, as many in each.  True losses (calibration data)
relative to the exact plan's go to results/trials/<task>.json, the table to README.md beside it.
Nothing is retrained, no plan is timed: the loss does not depend on either.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from blast_search import additivity, trials
from blast_search.deadline import FOREVER
from blast_search.engine import Engine
from blast_search.pipeline import opened
from blast_search.progress import Reporter
from blast_search.settings import Settings
from blast_search.storage import Storage
from blast_search.trials import Trials

FOLDER = Path(__file__).resolve().parent.parent / "results" / "trials"
MIXES = {  # shares of weights and of moves; the others are steps
    "weights": (1.0, 0.0),
    "weights, moves": (0.75, 0.25),
    "weights, steps, moves": (trials.WEIGHTS, trials.MOVES),
}


def mixed(engine: Engine, budget: float, mix: str, count: int, start: dict[str, float]) -> dict:
    """One study in a database of its own."""
    trials.WEIGHTS, trials.MOVES = MIXES[mix]
    with tempfile.TemporaryDirectory() as folder:
        stage = Trials(engine, budget, Storage(f"sqlite:///{folder}/study.db"), 0)
        stage.run(count, start, FOREVER)
    found = engine.tuning
    relative = [
        [t.user_attrs["stage"], round(fmean(t.user_attrs["losses"]) / found["exact_loss"] - 1, 4)]
        for t in stage.study.trials
        if "losses" in t.user_attrs
    ]
    return {"budget": budget, "mix": mix} | found | {"trials_relative_to_exact": relative}


def run(task: str, budgets: list[float], count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        settings = Settings(task, budgets[0], retrain_steps=0, profile="pruned")
        out = Path(name) / "run"
        with opened(settings, task, None, out, False, "local", None, Reporter(1)) as pipeline:
            engine = pipeline.measured()
            rows = []
            for budget in budgets:
                plan = engine.exact(engine.aim * budget)
                start, _ = additivity.check(engine, budget, [plan], 0, FOREVER)
                for mix in MIXES:
                    rows.append(mixed(engine, budget, mix, count, dict(start)))
                    print(
                        {k: rows[-1][k] for k in ("budget", "mix", "lowered_loss_by")}, flush=True
                    )
            facts = {"task": task, "trials": count, "environment": pipeline.prepared.environment}
    facts |= {"date": datetime.now(UTC).date().isoformat(), "rows": rows}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{task}.json").write_text(json.dumps(facts, indent=1) + "\n")


def summary() -> str:
    lines = [
        "# What the trials bring", "",
        "Written by `python benchmarks/trials.py TASK BUDGETS`: by how much the best of the "
        "trials lowered the true loss (calibration data, before retraining) of the exact plan, at "
        "equal predicted latency.", "",
        "| task | budget | trials | " + " | ".join(MIXES) + " | overhead per trial |",
        "|---|---:|---:|" + "---:|" * (len(MIXES) + 1),
    ]  # fmt: skip
    machines = []
    for file in sorted(FOLDER.glob("*.json")):
        value = json.loads(file.read_text())
        task, env = value["task"], value["environment"]
        for budget in sorted({row["budget"] for row in value["rows"]}):
            rows = {row["mix"]: row for row in value["rows"] if row["budget"] == budget}
            cells = [f"{rows[mix]['lowered_loss_by']:.1%}" for mix in MIXES]
            cells.append(f"{max(row['overhead_ms'] for row in rows.values()):.0f} ms")
            lines.append(f"| {task} | {budget:g} | {value['trials']} | {' | '.join(cells)} |")
        machines.append(
            f"{task}: {env['device']} ({env['threads']} threads, {env['dtype']}), torch "
            f"{env['torch']}, {value['date']}."
        )
    return "\n".join([*lines, "", *machines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("budgets", type=float, nargs="+")
    parser.add_argument("--trials", type=int, default=20)
    values = parser.parse_args()
    run(values.task, values.budgets, values.trials)
    (FOLDER / "README.md").write_text(summary())


if __name__ == "__main__":
    main()
