"""Optuna where additivity ends: how the score table is weighted, judged by the true loss.

The parameters are log2 factors on the scores of each layer type and of each third of the depth;
an exact solver turns them into a plan, so every trial is a whole plan within the budget.  The
first trial is the plan of the unweighted table: the result can never be worse than it.

A trial is sampled in memory and stored (SQLite by default) only when it is finished.  A killed
run therefore leaves no half-finished trials, and a resumed one samples exactly what an
undisturbed run would have.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blast_search.space import LayerSpec

Evaluate = Callable[[Mapping[str, float]], tuple[float, float, dict[str, Any]] | None]

RANGE = 1.5  # log2: a factor of up to 2.8 either way
MAX_TYPES = 8
DEPTH_BINS = 3


@dataclass(frozen=True)
class Storage:
    """Where a study lives: an Optuna storage URL and the study's name in it."""

    url: str
    study: str = "blast-search"


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


def refine(
    parameters: Sequence[str],
    evaluate: Evaluate,
    trials: int,
    storage: Storage,
    seed: int,
    on_trial: Callable[[], None] = lambda: None,
    expired: Callable[[], bool] = lambda: False,
) -> int:
    """Run up to `trials` trials (those already in the storage count) and return their number.

    Args:
        evaluate: parameter values -> (true loss, latency ratio minus the budget's, attributes),
            or None where no plan fits.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    minimize = optuna.study.StudyDirection.MINIMIZE
    directions = [minimize, minimize]  # true loss, latency ratio
    stored = optuna.create_study(
        study_name=storage.study, storage=storage.url, directions=directions, load_if_exists=True
    )
    study = optuna.create_study(directions=directions)
    study.add_trials(stored.get_trials(deepcopy=False))
    finished = len(study.trials)
    for _ in range(finished):
        on_trial()
    while finished < trials and not expired():
        # A sampler that depends on the history and the trial's number only (see above).
        study.sampler = optuna.samplers.TPESampler(seed=seed * 10_007 + finished)
        if finished == 0:
            study.enqueue_trial(dict.fromkeys(parameters, 0.0))
        trial = study.ask()
        values = {name: trial.suggest_float(name, -RANGE, RANGE) for name in parameters}
        outcome = evaluate(values)
        if outcome is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            loss, excess, attributes = outcome
            trial.set_constraint("latency_over_budget", excess)
            for key, value in attributes.items():
                trial.set_user_attr(key, value)
            study.tell(trial, [loss, float(attributes["latency_ratio"])])
        stored.add_trial(study.trials[-1])
        finished += 1
        on_trial()
    return finished


def finished(storage: Storage) -> list[tuple[dict[str, float], float, dict[str, str]]]:
    """(parameter values, true loss, plan) of every completed trial, in order."""
    import optuna

    trials = optuna.load_study(study_name=storage.study, storage=storage.url).get_trials(
        deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]
    )
    return [(dict(t.params), float(t.values[0]), dict(t.user_attrs["plan"])) for t in trials]
