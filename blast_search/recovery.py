"""Retraining that is kept only where it does not make things worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from blast_search.distributed import ALONE, Team
from blast_search.errors import IncompatibleInputError
from blast_search.evaluate import Task, evaluate, worse_by
from blast_search.progress import SILENT, Reporter
from blast_search.retrain import rate_of, retrain

SLOWER = 4  # a retraining that made things worse gets a learning rate so many times lower


@dataclass(frozen=True)
class Recovery:
    """What retraining gave: the model (None: none that is as good as before), and of the last try
    the metric (NaN where it failed), its steps and its error."""

    model: nn.Module | None
    metric: float
    steps: int
    error: IncompatibleInputError | None = None


def recover(
    task: Task,
    build: Callable[[], nn.Module],
    teacher: nn.Module,
    before: float,
    steps: int | None = None,
    seed: int = 0,
    slower: Sequence[float] = (1, SLOWER),
    report: Reporter = SILENT,
    name: str = "",
    team: Team = ALONE,
) -> Recovery:
    """Retrain a new model of `build`, and throw it away where that made the metric worse.

    That happens (a rate too high for the task, or a few steps of Adam, all that a time limit
    left); then it is tried once more at a lower rate.

    Args:
        before: the metric without retraining.
        slower: by what the learning rate is divided, try by try.
        name: of what is retrained, for messages.
        team: the processes that train together; where one of them fails, nothing is tried again.

    Raises:
        UsageError: fewer than 0 steps.
    """
    rate = rate_of(task)
    value, done, failure = float("nan"), 0, None
    for lower in slower:
        model, failure = build(), None
        stage = f"retrain {name}".strip() + (f" at 1/{lower:g} of the rate" if lower > 1 else "")
        try:
            done = len(
                retrain(task, model, teacher, steps, seed, rate / lower, report, stage, team=team)
            )
            value = team.told(partial(evaluate, task, model))
            harm = f"made {name or 'it'} worse ({before:.4g} before, {value:.4g} after)"
        except IncompatibleInputError as error:
            if team.size > 1:  # the others may not know of it
                raise
            value, failure = float("nan"), error
            harm = f"failed{f' for {name}' if name else ''} ({error})"
        if worse_by(task, value, before) <= 0:
            return Recovery(model, value, done)
        report.say(
            f"Retraining at a learning rate of {rate / lower:g} {harm}, judged by "
            f"{task.metric[0]}: it is not kept."
        )
        del model
    return Recovery(None, value, done, failure)
