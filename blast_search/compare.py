"""The search beside everything it should beat: one table at equal measured latency.

Every contender is the largest plan of its kind within the same measured budget; all are timed
side by side in one process and retrained alike: same data, steps and seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blast_search.comparison import SEARCH, Comparison, Row
from blast_search.contenders import Entry, Extra, level, line_up, without_plans
from blast_search.describe import peak_memory_mb, uniform_text
from blast_search.engine import Contender
from blast_search.errors import UsageError
from blast_search.evaluate import Task, size_ratios
from blast_search.finish import Finish
from blast_search.last_timing import Decision, reachable, why_no_faster
from blast_search.pipeline import Pipeline, opened, task_name
from blast_search.progress import SILENT, Reporter
from blast_search.runfolder import digest
from blast_search.settings import Settings
from blast_search.space import SearchSpace
from blast_search.structured import BlockDiagonal, Monarch


@dataclass(frozen=True)
class CompareSettings(Settings):
    """What a comparison is asked to do: a search's settings, and how often to retrain."""

    seeds: int = 3

    def check(self) -> None:
        """Raise UsageError for a value outside its range."""
        super().check()
        if self.budget is None:
            raise UsageError("no budget: give --budget, for instance 0.3.")
        if self.seeds < 1:
            raise UsageError(f"seeds is {self.seeds}, expected at least 1.")


def compare(
    task: Task | str,
    budget: float,
    seeds: int = 3,
    space: SearchSpace | str | Path | None = None,
    workers: str = "auto",
    *,
    workload: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    ray_address: str | None = None,
    trials: int = 20,
    retrain_steps: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    mode: str = "eager",
    profile: str = "full",
    every_workload: bool = False,
    extra: Extra | None = None,
    report: Reporter = SILENT,
) -> Comparison:
    """Compare the search with uniform plans of every structure at the same measured latency.

    Args:
        seeds: retrainings of every contender, with data seeds seed, seed + 1, ...
        seed: of the search as well.
        extra: more contenders, made after the search.
        out, resume, and the rest: as for `search`.

    Returns:
        The table; compare.csv, compare.md and compare.json are in its folder.  Its `missed` says
        why no plan of the search meets the budget, where that is so.

    Raises:
        UsageError, IncompatibleInputError, RunLockedError: see blast_search.errors.
    """
    name = space.name if isinstance(space, SearchSpace) else str(space or "default")
    settings = CompareSettings(
        task_name(task), budget, space=name, workload=workload,
        device=device, dtype=dtype, mode=mode, profile=profile, trials=trials,
        retrain_steps=retrain_steps, seed=seed, every_workload=every_workload, seeds=seeds,
    )  # fmt: skip
    if not resume:
        settings.check()
    with opened(settings, task, space, out, resume, workers, ray_address, report) as pipeline:
        result = _run(pipeline, extra)
        result.write()
        return result


def _run(pipeline: Pipeline, extra: Extra | None) -> Comparison:
    engine = pipeline.measured()
    finish = Finish(pipeline, engine)
    decision = finish.decide()
    # Counted once: a resumed run has the losses of later contenders on file, too.
    losses = sum(kind == "loss" for kind, _ in pipeline.records.measured)
    spent = int(pipeline.records.once("count", "losses", "loss evaluations", lambda: losses))
    entries: dict[str, Entry] = line_up(engine, decision)
    if extra:
        entries |= extra(engine, decision.target, spent)
    absent = without_plans(engine, entries)
    for kind, reason in absent.items():
        pipeline.report.say(f"no plan of the kind {kind}: {reason}")
    contenders = level(engine, entries, decision.target)
    return _judged(pipeline, finish, decision, contenders, spent, absent)


def _judged(
    pipeline: Pipeline,
    finish: Finish,
    decision: Decision,
    contenders: Mapping[str, Contender],
    spent: int,
    absent: Mapping[str, str],
) -> Comparison:
    """Metrics before and after retraining, and sizes, of contenders that were timed."""
    settings, p = pipeline.settings, pipeline.prepared
    assert isinstance(settings, CompareSettings)
    assert settings.budget is not None
    date = pipeline.records.once("date", "date", "of the timings", _today)
    steps = finish.models.steps(decision.winner, len(contenders) * settings.seeds)
    seeds = range(settings.seed, settings.seed + settings.seeds) if steps else range(0)
    rows = [Row("dense", "the model as it was", True, pipeline.dense_metric)]
    for name, contender in contenders.items():
        before = finish.models.metric(contender)
        after = tuple(_retrained(finish, name, contender, steps, seed) for seed in seeds)
        macs, params = size_ratios(p.layers, contender.choices, finish.params, finish.macs)
        keys = {layer: c.key for layer, c in contender.choices.items()}
        rows.append(
            Row(
                name, described(contender), contender.feasible, before, after,
                contender.timing, macs, params, keys,
            )
        )  # fmt: skip
    facts: dict[str, Any] = {
        "task": settings.task,
        "budget": settings.budget,
        "budget_scope": settings.budget_scope,
        "missed": missed(pipeline.folder, settings.budget, decision, contenders[SEARCH]),
        "without_plans": dict(absent),
        "retrain_steps": steps,
        "seeds": len(seeds),
        "search_seed": settings.seed,
        "loss_evaluations_of_the_search": spent,
        "trials": finish.describer.trials_paid(),
        "optuna": finish.engine.tuning,
        "date": date,
        "environment": p.environment,
        "seconds": dict(pipeline.seconds),
        "peak_memory_mb": round(peak_memory_mb(p.device), 1),
    }
    return Comparison(pipeline.folder, p.task.metric[0], p.task.metric[1], facts, rows)


def missed(run: Path, budget: float, decision: Decision, searched: Contender) -> str:
    """Why no plan of the search meets the budget, as `search` would say it; "" if one does."""
    if decision.met or searched.feasible:
        return ""
    return (
        f"no plan of the search meets budget {budget:g} (scope layers): the smallest reachable "
        f"budget is about {reachable(searched, 'layers'):.3f}; {why_no_faster(searched.choices)}. "
        f"The table is in {run / 'compare.md'}."
    )


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _retrained(finish: Finish, name: str, c: Contender, steps: int, seed: int) -> float:
    """The metric after retraining with one seed; equal plans share it."""
    kind = f"retrained {steps} steps, seed {seed}"
    key = f"{name}, seed {seed}"
    train = lambda: finish.models.trained(key, c, steps, seed)[1]  # noqa: E731
    return float(finish.records.once(kind, digest(c.choices), key, train))


def described(contender: Contender) -> str:
    """What a contender is, in words."""
    chosen = [c for c in contender.choices.values() if not c.is_dense]
    dense = len(contender.choices) - len(chosen)
    left = f", {dense} of {len(contender.choices)} layers dense" if dense else ""
    if not chosen:
        return "every layer dense"
    blocks = ", ".join(str(b) for b in sorted({c.num_blocks for c in chosen}))
    ranks = sorted({c.rank for c in chosen})
    span = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
    if isinstance(chosen[0], BlockDiagonal):
        return f"{blocks} dense blocks on the diagonal{left}"
    if isinstance(chosen[0], Monarch):
        return f"b = {blocks}, one parameter fraction, block ranks {span}{left}"
    if contender.name.startswith("uniform"):
        return uniform_text(contender)
    return f"per layer: b in {{{blocks}}}, ranks {span}{left}"
