"""Run blast-search on a built-in task and keep its result under results/<name>/.

    python benchmarks/demo.py minilm 0.3                  # runs the search
    python benchmarks/demo.py minilm 0.3 --run RUN_FOLDER # keeps a run that is there

Writes plan.json (all figures with device, versions, dtype, workload and date), front.csv,
front.png and table.md.  The README's table is table.md of `minilm 0.3`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from blast_search import Plan
from blast_search.report import RATIOS, result_rows

ROOT = Path(__file__).resolve().parent.parent


def table(plan: Plan) -> str:
    """The final table as Markdown, with its circumstances below."""
    metric = plan.measured["metric"]["name"]
    heads = ("plan", f"{metric} before", f"{metric} after", "layer latency", "model latency")
    lines = [f"| {' | '.join((*heads, 'MACs', 'parameters'))} |", "|---|" + "---:|" * 6]
    for row in result_rows(plan):
        name = f"{row['plan']} ({row['description']})" if row["description"] else row["plan"]
        cells = [name, _show(row["metric_before"], ".4g"), _show(row["metric_after"], ".4g")]
        cells += [_show(row[key], ".3f") for key in RATIOS]
        lines.append(f"| {' | '.join(cells)} |")
    env, search = plan.environment, plan.search
    seconds = search["seconds"]
    lines += [
        "",
        f"Measured on {env['device']} ({env['capability']}, {env['threads']} threads, "
        f"{env['dtype']}), torch {env['torch']}, Python {env['python']}, {plan.created[:10]}; "
        f"seed {search['seed']}, {search['trials']} Optuna trials; profile "
        f"{seconds['profile']:.0f} s, score {seconds['score']:.0f} s, search "
        f"{seconds['search']:.0f} s, judging and retraining of all plans "
        f"{seconds.get('retrain', 0):.0f} s; peak memory {search['peak_memory_mb']:.0f} MB.",
    ]
    return "\n".join(lines) + "\n"


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("budget", type=float)
    parser.add_argument("--run", type=Path, help="keep this finished run instead of a new one")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = arguments.run or Path(temporary) / "run"
        if not arguments.run:
            command = [
                sys.executable,
                "-m",
                "blast_search.cli",
                "search",
                "--task",
                arguments.task,
            ]
            command += ["--budget", str(arguments.budget), "--out", str(run), *options]
            # The time of profiling is part of the result: no cells of earlier runs.
            subprocess.run(command, check=True, env=os.environ | {"BLAST_SEARCH_CACHE": "off"})
        kept = ROOT / "results" / f"{arguments.task}-{arguments.budget:g}"
        kept.mkdir(parents=True, exist_ok=True)
        for name in ("plan.json", "front.csv", "front.png"):
            shutil.copyfile(run / name, kept / name)
        text = table(Plan.load(run / "plan.json"))
        (kept / "table.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
