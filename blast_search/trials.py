"""The stage that judges whole plans by true loss: Optuna's weights, then moves of single layers.

All trials are solved for one predicted latency, so that their true losses compare.  A trial that
is far above the best one on the calibration batches seen so far is given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

from blast_search import study
from blast_search.deadline import Deadline
from blast_search.engine import Engine
from blast_search.errors import InfeasibleBudgetError
from blast_search.hull import grouped
from blast_search.moves import moves
from blast_search.plan import Choices
from blast_search.runfolder import digest
from blast_search.solver import GAP, TOLERANCE
from blast_search.space import Candidate, ties_of

MOVES = 0.25  # of all trials
TOGETHER = 4  # trials that are sampled from one history, and judged side by side
TRIAL_GAP = 3e-3  # the scores are weighted by guesses: a tighter plan would only cost time
FRONT_BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Tuned:
    """The best weights found, the best plan (theirs, or one that moves made of it), trials run."""

    weights: dict[str, float]
    choices: Choices
    trials: int


def evaluate_front(
    engine: Engine,
    target: float,
    weights: Mapping[str, float],
    deadline: Deadline,
) -> None:
    """True losses of exact plans at other budgets."""
    budgets = [b for b in FRONT_BUDGETS if abs(b - target) > 0.02]
    plans: dict[str, Choices] = {}
    for budget in budgets:
        with suppress(InfeasibleBudgetError):
            plans[f"exact {budget:.2f}"] = engine.exact(budget, weights)
    with engine.report.stage("evaluate the front", len(plans)) as advance:
        found = engine.judged("front", list(plans.values()), deadline=deadline, advance=advance)
    for (name, choices), losses in zip(plans.items(), found, strict=True):
        if losses:
            engine.note_point(name, choices, fmean(losses))


class Trials:
    """Trials of one run at one target."""

    def __init__(self, engine: Engine, target: float, storage: study.Storage, seed: int) -> None:
        self.engine, self.ratio, self.target = engine, engine.aim * target, target
        self.groups = study.parameter_groups(engine.layers)
        parameters = sorted({g for names in self.groups.values() for g in names})
        self.study = study.Study(parameters, storage, seed)
        self.evaluating = 0.0  # seconds in building and judging models

    def run(self, count: int, start: Mapping[str, float], deadline: Deadline) -> Tuned | None:
        """Trials until the study has `count`, the last quarter of them moves.

        Args:
            start: parameters to try right after the exact plan's; may be empty.
        """
        engine, before = self.engine, len(self.study.trials)
        began = time.monotonic()
        starts = [dict[str, float]()] + ([dict(start)] if start else [])
        with engine.report.stage("optuna trials", count) as advance:
            for _ in range(before):
                advance()
            while (done := self.study.sync()) < count and not deadline.expired():
                first, end = self.batch(done, count)
                if done < self.weighted(count):
                    asked = self.study.ask(first, end, starts[first:])
                    plans = [self.solved(trial.values) for trial in asked]
                    self.judge("weights", first, list(zip(asked, plans, strict=True)), advance)
                elif not self.move(first, end, advance):
                    break
            self.study.flush()
        found = study.finished(self.study.trials)
        if not found:
            return None
        for item in found:
            engine.note_point("trial", _choices(item.plan), item.loss)
        best = min(found, key=lambda item: item.loss)
        ran = len(self.study.trials) - before
        outside = time.monotonic() - began - self.evaluating
        engine.tuning = self.summary(found, round(outside / ran * 1e3, 1) if ran else None)
        weights = study.weights(engine.layers, self.groups, best.values)
        return Tuned(weights, _choices(best.plan), len(self.study.trials))

    def weighted(self, count: int) -> int:
        """How many of all trials try weights; the others try moves."""
        return count - int(MOVES * count)

    def batch(self, done: int, count: int) -> tuple[int, int]:
        """The first trial of the batch that trial number `done` belongs to, and the batch's end.

        Where other runs work on the study, everybody takes one trial at a time.
        """
        size, weighted = (1 if self.study.worker else TOGETHER), self.weighted(count)
        low, high = (0, weighted) if done < weighted else (weighted, count)
        first = done - (done - low) % size
        return first, min(first + size, high)

    def solved(self, values: Mapping[str, float]) -> Choices | None:
        """The exact plan of weighted scores."""
        weights = study.weights(self.engine.layers, self.groups, values)
        plain = not any(values.values())
        try:
            return self.engine.exact(self.ratio, weights, GAP if plain else TRIAL_GAP)
        except InfeasibleBudgetError:
            return None

    def judge(
        self,
        stage: str,
        first: int,
        trials: Sequence[tuple[study.Asked, Choices | None]],
        advance: Callable[[], None],
    ) -> None:
        """Judge a batch's plans side by side and store its trials, but those on file."""
        found = study.finished(self.study.trials[:first])
        best = min(found, key=lambda item: item.loss, default=None)
        new = trials[len(self.study.trials) - first :]
        plans = [plan for _, plan in new if plan]
        began = time.monotonic()
        answers = self.engine.judged("trial", plans, bar=best.losses if best else ())
        self.evaluating += time.monotonic() - began
        losses = iter(answers)
        for asked, plan in new:
            self.study.tell(asked, self.outcome(stage, plan, next(losses)) if plan else None)
            advance()

    def outcome(
        self, stage: str, choices: Choices, losses: Sequence[float] | None
    ) -> study.Outcome:
        ratio = self.engine.predicted_ratio(choices)
        assert ratio is not None
        assert losses is not None
        plan = {name: c.key for name, c in choices.items()}
        pruned = len(losses) < len(self.engine.order)
        return study.Outcome(losses, ratio, ratio - self.target, plan, stage, pruned)

    def move(self, first: int, end: int, advance: Callable[[], None]) -> bool:
        """Moves of the best plan before `first`, stored as trials of its weights.

        Returns:
            Whether there was any left to try.
        """
        engine, history = self.engine, self.study.trials[:first]
        found = study.finished(history)
        if not found:
            return False
        tried = {digest(_choices(t.user_attrs["plan"])) for t in history if "plan" in t.user_attrs}
        best = min(found, key=lambda item: item.loss)
        weights = study.weights(engine.layers, self.groups, best.values)
        groups = grouped(engine.options(), weights, ties_of(engine.layers))
        plans = moves(groups, _choices(best.plan), self.ratio * engine.dense_cost)
        untried = (p for p in plans if digest(p) not in tried and self.fits(p))
        batch = list(islice(untried, end - first))
        asked = self.study.ask(first, first + len(batch), [best.values] * len(batch))
        done = len(self.study.trials)
        self.judge("move", first, list(zip(asked, batch, strict=True)), advance)
        return len(self.study.trials) > done

    def fits(self, plan: Choices) -> bool:
        """Whether a move also keeps a budget that holds on each workload."""
        return (self.engine.predicted_ratio(plan) or 0.0) <= self.ratio * (1 + TOLERANCE)

    def summary(
        self, found: Sequence[study.Finished], overhead_ms: float | None
    ) -> dict[str, Any]:
        """What the stage brought (plan.json, search.optuna); losses at one predicted latency."""
        plain = (t for t in found if t.stage == "weights" and not any(t.values.values()))
        exact = next((t.loss for t in plain), None)
        by_stage = {
            stage: min((t.loss for t in found if t.stage == stage), default=None)
            for stage in ("weights", "move")
        }
        best = min(t.loss for t in found)
        states = [t.state.name for t in self.study.trials]
        return {
            "trials": len(states),
            "pruned": states.count("PRUNED"),
            "moves": sum(t.user_attrs.get("stage") == "move" for t in self.study.trials),
            "workers": len({study.worker_of(t) for t in self.study.trials}),
            "exact_loss": exact,
            "weights_loss": by_stage["weights"],
            "moves_loss": by_stage["move"],
            "best_loss": best,
            "lowered_loss_by": 1 - best / exact if exact else None,
            "overhead_ms": overhead_ms,
        }


def _choices(plan: Mapping[str, str]) -> dict[str, Candidate]:
    return {name: Candidate.from_key(key) for name, key in plan.items()}
