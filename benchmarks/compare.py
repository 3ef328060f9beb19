"""The search against uniform plans of every structure and against plain Optuna samplers.

    python benchmarks/compare.py minilm 0.3 --seeds 3 --trials 20      # one task, one budget
    python benchmarks/compare.py minilm smollm2 vit 0.3 0.5 0.7         # all of them, in turn
    python benchmarks/compare.py --summary                              # only README.md again

Each (task, budget) is a run of `blast-search compare` in results/compare-runs/<task>-<budget>
with two more contenders: TPE and NSGA-II that choose every layer's candidate themselves, with as
many whole models evaluated as the search evaluated.  A run that was stopped goes on where it was;
a finished one is only read.  Its table is kept in results/compare/<task>-<budget>/.  What no
budget changes (cells, probes, random plans) is taken over from the task's earlier budgets.

The samplers get what the search gets: the same candidates per layer (none that is slower than
dense or dominated), the corrected latency table, the true loss.  A suggestion that the table puts
over the budget costs them no evaluation, up to `SUGGESTIONS` per evaluation.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import yaml

from blast_search.closed_loop import meet
from blast_search.compare import compare
from blast_search.contenders import Entry, solved, timed_plan
from blast_search.decision import first_plans, uniform_kinds
from blast_search.engine import AIM, Engine
from blast_search.errors import InfeasibleBudgetError
from blast_search.plan import Choices
from blast_search.progress import Reporter
from blast_search.runfolder import FIELDS
from blast_search.space import Candidate

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "results" / "compare"
RUNS = ROOT / "results" / "compare-runs"
SUGGESTIONS = 50
# Kinds of measurements that no budget changes.  Not "loss": a run's evaluations are counted.
FOR_ANY_BUDGET = ("random plans", "loss on ", "metric")
UNBUILT = 1e9  # the value of a suggestion over the budget; its constraint says by how much


def samplers(evaluations: int, seed: int):
    """Optuna's samplers at their defaults; NSGA-II gets at least four generations."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    population = max(4, min(50, evaluations // 4))
    return {
        "TPE over all layers": optuna.samplers.TPESampler(seed=seed),
        "NSGA-II over all layers": optuna.samplers.NSGAIISampler(
            population_size=population, seed=seed
        ),
    }


def sampled(engine: Engine, name: str, sampler, target: float, evaluations: int) -> Entry:
    """The best plan within the target among those that a sampler suggested."""
    import optuna

    study = optuna.create_study(sampler=sampler)
    options = {
        layer: [o.candidate.key for o in items] for layer, items in engine.options().items()
    }
    built: list[tuple[float, Choices]] = []
    fastest: tuple[float, Choices] = (math.inf, {})
    with engine.report.stage(name, evaluations) as advance:
        for _ in range(SUGGESTIONS * evaluations):
            if len(built) == evaluations:
                break
            trial = study.ask()
            choices = {
                layer: Candidate.from_key(trial.suggest_categorical(layer, keys))
                for layer, keys in options.items()
            }
            ratio = engine.predicted_ratio(choices)
            fastest = min(fastest, (ratio, choices), key=lambda item: item[0])
            trial.set_constraint("latency_over_budget", ratio - AIM * target)
            loss = UNBUILT
            if ratio <= AIM * target:
                loss = engine.true_loss(name, choices)
                built.append((loss, choices))
                advance()
            study.tell(trial, loss)
    engine.report.say(
        f"{name}: {len(study.trials)} suggestions, {len(built)} within the budget by the table"
    )

    def make(ratio: float) -> Choices:
        fitting = [item for item in built if engine.predicted_ratio(item[1]) <= ratio]
        if not fitting:
            raise InfeasibleBudgetError(f"{name} found no plan with a ratio of {ratio:.3f}.")
        return min(fitting, key=lambda item: item[0])[1]

    found = meet(engine, name, make, target) or timed_plan(engine, name, fastest[1], target)
    return solved(engine, found, make, target)


def extra(seed: int):
    def made(engine: Engine, target: float, evaluations: int) -> Mapping[str, Entry]:
        # The correction that the exact plan's measurements asked for, as the search has it.
        first_plans(engine, target, uniform_kinds(engine, target))
        correction = engine.latency.correction
        entries = {}
        for name, sampler in samplers(evaluations, seed).items():
            engine.latency.correction = correction
            entries[name] = sampled(engine, name, sampler, target, evaluations)
        return entries

    return made


def begin(folder: Path, others: str, budget: float, arguments: argparse.Namespace) -> None:
    """Start a run with what another budget's run of the task measured for any budget."""
    for config in sorted(RUNS.glob(f"{others}-*/config.yaml")):
        settings = yaml.safe_load(config.read_text())
        if settings["space"] != arguments.space or settings["seed"] != arguments.seed:
            continue
        if not (config.parent / "scores.csv").is_file():  # it has not got that far
            continue
        folder.mkdir(parents=True)
        for file in ("latency.csv", "probes.csv"):
            shutil.copyfile(config.parent / file, folder / file)
        rows = list(csv.DictReader((config.parent / "measured.csv").open()))
        with (folder / "measured.csv").open("w", newline="") as out:
            writer = csv.DictWriter(out, FIELDS)
            writer.writeheader()
            writer.writerows(row for row in rows if row["kind"].startswith(FOR_ANY_BUDGET))
        asked = {"budget": budget} | {
            key: getattr(arguments, key) for key in ("seeds", "trials", "retrain_steps")
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(settings | asked, sort_keys=False))
        return


def run(task: str, budget: float, arguments: argparse.Namespace) -> None:
    stem = task.replace(":", "-").replace("/", "-")
    name = f"{stem}-{budget:g}"
    folder, kept = RUNS / name, KEPT / name
    if not folder.exists():
        begin(folder, stem, budget, arguments)
    resume = (folder / "config.yaml").is_file()
    if not (folder / "compare.json").is_file():
        compare(
            task, budget, arguments.seeds, arguments.space, arguments.workers,
            trials=arguments.trials, retrain_steps=arguments.retrain_steps, out=folder,
            resume=resume, seed=arguments.seed, report=Reporter(1),
            extra=extra(arguments.seed) if arguments.samplers else None,
        )  # fmt: skip
    kept.mkdir(parents=True, exist_ok=True)
    for file in ("compare.csv", "compare.md", "compare.json"):
        shutil.copyfile(folder / file, kept / file)
    print((kept / "compare.md").read_text())


def summary() -> str:
    """README.md of the kept results: what the search won, tied and lost, per task and budget."""
    lines = [
        "# The search against everything it should beat", "",
        "Written by `python benchmarks/compare.py TASK BUDGET`; each folder's compare.md has the "
        "table, with both metrics, all ratios and the circumstances.", "",
        "| task | budget | retrainings | wins against | ties with | loses to | not comparable |",
        "|---|---:|---:|---|---|---|---|",
    ]  # fmt: skip
    for file in sorted(KEPT.glob("*/compare.json")):
        value = json.loads(file.read_text())
        sides: dict[str, list[str]] = {key: [] for key in ("a win", "a tie", "a loss", "no comp")}
        for text in value["verdicts"]:
            other, _, rest = text.partition(": ")
            for key, names in sides.items():
                if rest.startswith(key):
                    names.append(other)
        cells = [", ".join(names) or "-" for names in sides.values()]
        wins, ties, losses, none = cells
        link = f"[{value['task']}]({file.parent.name}/compare.md)"
        lines.append(
            f"| {link} | {value['budget']:g} | {value['seeds']} | {wins} | {ties} | {losses} "
            f"| {none} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help="tasks and budgets, each with each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--retrain-steps", type=int)
    parser.add_argument("--space", default="default")
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--no-samplers", dest="samplers", action="store_false",
                        help="without TPE and NSGA-II over all layers")  # fmt: skip
    parser.add_argument("--summary", action="store_true")
    arguments = parser.parse_args()
    budgets = [float(w) for w in arguments.what if _is_number(w)]
    tasks = [w for w in arguments.what if not _is_number(w)]
    if not arguments.summary and not (tasks and budgets):
        parser.error("give at least one task and one budget, for instance: minilm 0.3")
    for task in tasks:
        for budget in budgets:
            run(task, budget, arguments)
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / "README.md").write_text(summary())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main()
