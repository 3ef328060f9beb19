"""The stage that judges whole plans by true loss: Optuna's weights, then steps, then moves.

A weight is a guess about all layers of a type or a third of the depth.  A step goes from the best
plan so far where the gradient of the true loss points (tangent.py); a move changes two layers.

All trials are solved for one predicted latency, so that their true losses compare.  A trial that
is far above the best one on the calibration batches seen so far is given up.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from blast_search import study
from blast_search.deadline import FOREVER, Deadline
from blast_search.engine import Engine
from blast_search.errors import InfeasibleBudgetError
from blast_search.hull import grouped
from blast_search.moves import moves
from blast_search.plan import Choices
from blast_search.runfolder import digest
from blast_search.solver import GAP, TOLERANCE
from blast_search.space import Candidate, ties_of
from blast_search.storage import Storage
from blast_search.tangent import Tangent

# Of all trials; the others are steps, which bring more than either (results/trials).
WEIGHTS = MOVES = 0.1
# Of the curvature that is left at a plan (Tangent.trust): how far steps dare to go, in the order
# in which they are tried.
# Shares that follow the curvature which the last steps showed were tried: no lower loss.
SHARES = (1.0, 1.4, 0.7, 2.0, 2.8, 0.5, 4.0, 0.35, 5.6, 0.85, 1.2)
TOGETHER = 4  # trials that are sampled from one history, and judged side by side
# The share for a plan at another ratio: it should change no more than it must.  On `vit`, 2 to 4 %
# away from the trials' ratio, 4 kept more of their gain than 0.35, 0.7, 1, 1.4 and 2.
NEAR = 4.0
TRIAL_GAP = 3e-3  # the scores are weighted by guesses: a tighter plan would only cost time
FRONT_BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Tuned:
    """What the trials found.

    Attributes:
        weights: the best ones.
        choices: the best plan: theirs, or one that steps and moves made of it.
        trials: run so far.
        near: a plan like the best one at another predicted ratio.
    """

    weights: dict[str, float]
    choices: Choices
    trials: int
    near: Callable[[float], Choices]


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

    def __init__(self, engine: Engine, target: float, storage: Storage, seed: int) -> None:
        self.engine, self.ratio, self.target = engine, engine.aim * target, target
        self.groups = study.parameter_groups(engine.layers)
        parameters = sorted({g for names in self.groups.values() for g in names})
        if storage.worker:  # true losses compare at one ratio only, and some ratios are measured
            storage = replace(storage, study=f"{storage.study}-{self.ratio:.3f}")
        self.study = study.Study(parameters, storage, seed)
        self.evaluating = 0.0  # seconds in building, judging and differentiating models
        self.deadline, self.correction = FOREVER, engine.latency.correction
        self._tangents: dict[str, Tangent | None] = {}  # of the last plan
        self._steps: dict[float, Choices] = {}  # along it, by share
        self._digests: list[str] = []  # of the trials' plans; "" where one has none

    def run(self, count: int, start: Mapping[str, float], deadline: Deadline) -> Tuned | None:
        """Trials until the study has `count`: weights, steps, moves.

        Args:
            start: parameters to try right after the exact plan's; may be empty.
        """
        engine, before, self.deadline = self.engine, len(self.study.trials), deadline
        began = time.monotonic()
        starts = [dict[str, float]()] + ([dict(start)] if start else [])
        with engine.report.stage("optuna trials", count) as advance:
            for _ in range(before):
                advance()
            try:
                while (done := self.study.sync()) < count and not deadline.expired():
                    first, end = self.batch(done, count)
                    if done < self.weighted(count):
                        asked = self.study.ask(first, end, starts[first:])
                        plans = [self.solved(trial.values) for trial in asked]
                        self.judge("weights", first, list(zip(asked, plans, strict=True)), advance)
                    elif not (
                        (done < count - self.moves(count) and self.step(first, end, advance))
                        or self.move(first, end, advance)
                    ):
                        break
            finally:  # also of a run that a signal ends
                self.study.store()
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
        near = lambda ratio: self.near(best, ratio, weights)  # noqa: E731
        return Tuned(weights, _choices(best.plan), len(self.study.trials), near)

    def weighted(self, count: int) -> int:
        """How many of all trials try weights: at least the exact plan's and the fitted ones."""
        return max(min(2, count), int(WEIGHTS * count))

    def moves(self, count: int) -> int:
        """How many of all trials are left to moves."""
        return int(MOVES * count)

    def batch(self, done: int, count: int) -> tuple[int, int]:
        """The first trial of the batch that trial number `done` belongs to, and the batch's end.

        A run may have been killed in the middle of its last batch.  Where other runs work on the
        study, everybody takes one trial at a time: of equal histories they would make equal steps.
        """
        if not self.study.alone:
            return done, done + 1
        last = self.study.trials[-1].user_attrs.get("batch") if done else None
        if last and done < sum(last):
            return last[0], sum(last)
        ends = (self.weighted(count), count - self.moves(count), count)
        return done, min(done + TOGETHER, next(end for end in ends if done < end))

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
        self.study.store()
        answers = self.engine.judged("trial", plans, bar=best.losses if best else ())
        self.evaluating += time.monotonic() - began
        losses = iter(answers)
        for asked, plan in new:
            outcome = self.outcome(stage, plan, next(losses)) if plan else None
            self.study.tell(asked, outcome, (first, len(trials)))
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

    def step(self, first: int, end: int, advance: Callable[[], None]) -> bool:
        """Plans around the best one before `first`, as its gradient has them: see `changed`."""

        def plans(best: study.Finished) -> Iterator[Choices]:
            if tangent := self.tangent(best):
                with suppress(InfeasibleBudgetError):  # another run's plan, on another table
                    for share in self.shares():
                        if share not in self._steps:
                            self._steps[share] = tangent.solve(self.ratio, share, TRIAL_GAP)
                        yield self._steps[share]

        return self.changed("step", first, end, plans, advance)

    def shares(self) -> tuple[float, ...]:
        """SHARES; where other runs work on the study, each run begins with another one of them."""
        own = 0 if self.study.alone else zlib.crc32(self.study.worker.encode()) % len(SHARES)
        return SHARES[own:] + SHARES[:own]

    def move(self, first: int, end: int, advance: Callable[[], None]) -> bool:
        """Moves of the best plan before `first`: see `changed`."""
        engine = self.engine

        def plans(best: study.Finished) -> Iterator[Choices]:
            weights = study.weights(engine.layers, self.groups, best.values)
            groups = grouped(engine.options(), weights, ties_of(engine.layers))
            return moves(groups, _choices(best.plan), self.ratio * engine.dense_cost)

        return self.changed("move", first, end, plans, advance)

    def changed(
        self,
        stage: str,
        first: int,
        end: int,
        plans: Callable[[study.Finished], Iterator[Choices]],
        advance: Callable[[], None],
    ) -> bool:
        """Judge plans made of the best one before `first`, as trials of its weights.

        Returns:
            Whether there was any left to try.
        """
        history = self.study.trials[:first]
        found = study.finished(history)
        if not found:
            return False
        for trial in history[len(self._digests) :]:
            plan = trial.user_attrs.get("plan")
            self._digests.append(digest(_choices(plan)) if plan else "")
        tried = set(self._digests[:first])
        best, batch = min(found, key=lambda item: item.loss), list[Choices]()
        for plan in plans(best):
            if digest(plan) not in tried and self.fits(plan):
                tried.add(digest(plan))
                batch.append(plan)
            if len(batch) == end - first:
                break
        asked = self.study.ask(first, first + len(batch), [best.values] * len(batch))
        done = len(self.study.trials)
        self.judge(stage, first, list(zip(asked, batch, strict=True)), advance)
        return len(self.study.trials) > done

    def tangent(self, best: study.Finished) -> Tangent | None:
        """The tangent at a trial's plan; None where the model cannot be differentiated."""
        plan = _choices(best.plan)
        key = digest(plan)
        if key not in self._tangents:
            began, self._steps = time.monotonic(), {}
            try:
                # As during the trials: a resumed run may get here when it was corrected since.
                with self.engine.latency.kept(self.correction):
                    self._tangents = {key: self.engine.tangent(plan, best.loss, self.deadline)}
            except RuntimeError as error:
                self._tangents = {key: None}
                what = " ".join(str(error).split())[:200]
                self.engine.report.say(f"no steps along the gradient at a plan: {what}")
            self.evaluating += time.monotonic() - began
        return self._tangents[key]

    def near(self, best: study.Finished, ratio: float, weights: Mapping[str, float]) -> Choices:
        """A plan like the best trial's at another predicted ratio, as far as it reaches."""
        if tangent := self.tangent(best):
            with suppress(InfeasibleBudgetError):
                return tangent.solve(ratio, NEAR)
        return self.engine.exact(ratio, weights)

    def fits(self, plan: Choices) -> bool:
        """Whether a plan also keeps a budget that holds on each workload."""
        ratio = self.engine.predicted_ratio(plan)
        return ratio is not None and ratio <= self.ratio * (1 + TOLERANCE)

    def summary(
        self, found: Sequence[study.Finished], overhead_ms: float | None
    ) -> dict[str, Any]:
        """What the stage brought (plan.json, search.optuna); losses at one predicted latency."""
        plain = (t for t in found if t.stage == "weights" and not any(t.values.values()))
        exact = next((t.loss for t in plain), None)
        by_stage = {
            stage: min((t.loss for t in found if t.stage == stage), default=None)
            for stage in ("weights", "step", "move")
        }
        best = min(t.loss for t in found)
        states = [t.state.name for t in self.study.trials]
        return {
            "trials": len(states),
            "pruned": states.count("PRUNED"),
            "steps": sum(t.user_attrs.get("stage") == "step" for t in self.study.trials),
            "moves": sum(t.user_attrs.get("stage") == "move" for t in self.study.trials),
            "workers": len({study.worker_of(t) for t in self.study.trials}),
            "exact_loss": exact,
            "weights_loss": by_stage["weights"],
            "steps_loss": by_stage["step"],
            "moves_loss": by_stage["move"],
            "best_loss": best,
            "lowered_loss_by": 1 - best / exact if exact else None,
            "overhead_ms": overhead_ms,
        }


def _choices(plan: Mapping[str, str]) -> dict[str, Candidate]:
    return {name: Candidate.from_key(key) for name, key in plan.items()}
