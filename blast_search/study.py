"""Optuna where additivity ends: how the score table is weighted, judged by the true loss.

The parameters are log2 factors on the scores of each layer type and of each third of the depth;
an exact solver turns them into a plan, so every trial is a whole plan within the budget.  The
first trial is the plan of the unweighted table: the result can never be worse than it.

A trial is sampled in memory and stored (SQLite by default) only when it is finished.  A killed
run therefore leaves no half-finished trials.  Trials are sampled in batches, so that their plans
can be judged side by side; those of a batch see no trial of it, and a resumed run, which may find
half a batch, samples exactly what an undisturbed one would have.

Many runs may work on one study (a database that all of them reach, see `Storage`): each takes
over what the others have finished before it samples its next trial.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from blast_search.space import LayerSpec
from blast_search.storage import Storage, add_trial, open_study, stored_trials

RANDOM = 4  # trials before the sampler learns: there are few in all
RANGE = 1.5  # log2: a factor of up to 2.8 either way
MAX_TYPES = 8
DEPTH_BINS = 3


@dataclass(frozen=True)
class Outcome:
    """What a trial gave.

    Attributes:
        losses: true loss by calibration batch; of a pruned trial, of the batches that it saw.
        ratio: predicted latency ratio; `excess`, that minus the budget's.
        plan: layer -> Candidate.key.
        stage: "weights", "step" or "move".
    """

    losses: Sequence[float]
    ratio: float
    excess: float
    plan: Mapping[str, str]
    stage: str
    pruned: bool


@dataclass(frozen=True)
class Asked:
    """A sampled trial that is not finished: its number, its parameters, and Optuna's objects."""

    number: int
    values: Mapping[str, float]
    study: Any
    trial: Any


def parameter_groups(layers: Sequence[LayerSpec]) -> dict[str, tuple[str, ...]]:
    """Layer name -> the parameters that weight it: its type, and its third of the depth."""
    sizes: dict[str, float] = {}
    for layer in layers:
        size = float(layer.in_features * layer.out_features)
        sizes[layer.type_name] = sizes.get(layer.type_name, 0.0) + size
    known = sorted(sizes, key=lambda t: -sizes[t])[:MAX_TYPES]
    groups: dict[str, tuple[str, ...]] = {}
    for index, layer in enumerate(layers):
        kind = layer.type_name if layer.type_name in known else "other"
        depth = index * DEPTH_BINS // len(layers)
        groups[layer.name] = (f"type:{kind}", f"depth:{depth}")
    return groups


def weights(
    layers: Sequence[LayerSpec], groups: Mapping[str, tuple[str, ...]], values: Mapping[str, float]
) -> dict[str, float]:
    """Factor on each layer's scores for given parameter values."""
    return {
        layer.name: 2.0 ** sum(values.get(group, 0.0) for group in groups[layer.name])
        for layer in layers
    }


class Study:
    """An Optuna study whose trials are stored when they are finished.

    Objectives: true loss and latency ratio, both to be small; constraint: the budget.
    """

    def __init__(self, parameters: Sequence[str], storage: Storage, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.parameters, self.worker, self.seed = list(parameters), storage.worker, seed
        self.trials: list[Any] = []  # all finished ones (optuna.trial.FrozenTrial), oldest first
        self.storage, self._stored = storage, open_study(storage)
        self._seen: set[Any] = set()
        self._memory: Any = None  # see _history
        # Storing takes longer than sampling (one query per parameter and more), so it happens
        # beside the next evaluation.  A run that is killed before finds the losses on file.
        self._writer = ThreadPoolExecutor(1, "study")
        self._waiting: list[Any] = []  # trials
        self._writes: list[Future[None]] = []
        self.sync()

    def sync(self) -> int:
        """Take over what others have stored; returns the number of finished trials."""
        if self._seen and not self.worker:
            return len(self.trials)  # the run folder's own study: nobody else writes to it
        self.flush()
        stored = stored_trials(self._stored, self.storage)
        for trial in stored:
            key = trial.user_attrs.get("id", trial.number)
            if key not in self._seen:  # it may be there twice: the first writing seemed to fail
                self._seen.add(key)
                self.trials.append(trial)
        return len(self.trials)

    @property
    def alone(self) -> bool:
        """Whether all trials so far are this run's."""
        return all(worker_of(t) == self.worker for t in self.trials)

    def store(self) -> None:
        """Begin to store the trials that wait for it: to be called before plans are judged."""
        for trial in self._waiting:
            self._writes.append(self._writer.submit(add_trial, self._stored, self.storage, trial))
        self._waiting = []

    def flush(self) -> None:
        """Wait until every finished trial is stored; raises what the storage raised."""
        self.store()
        while self._writes:
            self._writes.pop(0).result()

    def ask(self, first: int, end: int, starts: Sequence[Mapping[str, float]] = ()) -> list[Asked]:
        """Trials number `first` to `end` - 1, all sampled from the history before `first`.

        Args:
            starts: parameters of the first of them (missing ones are 0); the others are sampled.
        """
        import optuna

        history, memory = self.trials[:first], self._history(first)
        # A sampler that depends on the history, the trial's number and, where several runs work
        # on the study, on the run: equal histories must not make them sample the same.
        shared = any(worker_of(t) != self.worker for t in history)
        own = zlib.crc32(self.worker.encode()) if shared else 0
        asked = []
        for number in range(first, end):
            seed = (self.seed * 10_007 + number + own) % 2**32
            # Jointly: sampled one by one, eleven parameters take 40 ms instead of 13.
            memory.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=RANDOM, multivariate=True
            )
            if number - first < len(starts):
                start = starts[number - first]
                memory.enqueue_trial({name: start.get(name, 0.0) for name in self.parameters})
            trial = memory.ask()
            values = {name: trial.suggest_float(name, -RANGE, RANGE) for name in self.parameters}
            asked.append(Asked(number, values, memory, trial))
        return asked

    def _history(self, first: int) -> Any:
        """A study in memory with the trials before `first`: the last one, where it can go on.

        It cannot where trials that it asked for were not told: half a batch was on file.
        """
        import optuna

        held = self._memory.get_trials(deepcopy=False) if self._memory else []
        if not self._memory or len(held) > first or not all(t.state.is_finished() for t in held):
            self._memory, held = optuna.create_study(directions=["minimize"] * 2), []
        self._memory.add_trials(self.trials[len(held) : first])
        return self._memory

    def tell(self, asked: Asked, outcome: Outcome | None, batch: tuple[int, int]) -> None:
        """Finish a trial with what it gave (None: there is no plan for its parameters).

        It is stored at the next `store` or `flush`.

        Args:
            batch: the first trial of its batch, and how many the batch has.
        """
        from optuna.trial import TrialState

        memory, trial = asked.study, asked.trial
        # Its number in the storage will be another one where several runs work on the study.
        trial.set_user_attr("id", f"{self.worker}#{asked.number}")
        trial.set_user_attr("batch", list(batch))
        if outcome is None:
            memory.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_constraint("latency_over_budget", outcome.excess)
            trial.set_user_attr("losses", list(outcome.losses))
            trial.set_user_attr("plan", dict(outcome.plan))
            trial.set_user_attr("stage", outcome.stage)
            if outcome.pruned:
                memory.tell(trial, state=TrialState.PRUNED)
            else:
                memory.tell(trial, [fmean(outcome.losses), outcome.ratio])
        frozen = memory.get_trials(deepcopy=False)[trial.number]
        self._waiting.append(frozen)
        self.trials.append(frozen)
        self._seen.add(f"{self.worker}#{asked.number}")


def worker_of(trial: Any) -> str:
    """Who ran a trial of a study."""
    return str(trial.user_attrs.get("id", "#")).rpartition("#")[0]


@dataclass(frozen=True)
class Finished:
    """A completed trial."""

    values: Mapping[str, float]
    loss: float
    losses: Sequence[float]  # by calibration batch
    plan: Mapping[str, str]  # layer -> Candidate.key
    stage: str


def finished(trials: Sequence[Any]) -> list[Finished]:
    """The completed trials of a study, in order."""
    return [
        Finished(
            dict(t.params), float(t.values[0]), tuple(t.user_attrs["losses"]),
            dict(t.user_attrs["plan"]), str(t.user_attrs["stage"]),
        )
        for t in trials
        if t.state.name == "COMPLETE"
    ]  # fmt: skip
