"""Do scores of layers add up to the loss of the model?  Random plans near the budget say.

The solver minimises a sum of scores, one per layer.  Where layers interact, that sum ranks plans
badly.  About fifty random plans are built and judged on a few calibration batches; the rank
correlation (Spearman) and the slope of summed score against true loss are reported, and factors
on the scores are fitted to these plans (by layer type and depth, the parameters of study.py):

    log loss = a + p * log( sum over layers of 2^(type + depth) * score )

The fitted factors are a start for Optuna.  Where additivity is poor and they rank held-out plans
better, they take the place of the plain scores in the rest of the search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from blast_search import solver, study
from blast_search.deadline import Deadline
from blast_search.engine import Engine
from blast_search.plan import Choices
from blast_search.runfolder import digest
from blast_search.space import LayerSpec, ties_of

PLANS = 50
BATCHES = 2  # of the calibration data, per random plan
SHARE = 0.3  # of the time that is left to the search
FEW = 20  # with fewer plans than this nothing is fitted, and nothing is called poor
POOR = 0.7  # rank correlation below which the fitted factors take over, if they do better
CLEARLY = 0.05  # by which they must do better on held-out plans

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Additivity:
    """What random plans said.

    Attributes:
        values: fitted parameters (study.parameter_groups); empty where too few plans were built.
        replaces: the fitted factors take the place of the plain scores.
        evidence: for plan.json, "search.additivity".
    """

    values: Mapping[str, float]
    replaces: bool
    evidence: dict[str, Any]


def check(
    engine: Engine, target: float, built: Sequence[Choices], seed: int, deadline: Deadline
) -> tuple[Mapping[str, float], dict[str, float]]:
    """Build and judge random plans, and fit factors to them.

    Args:
        built: plans that were built before; of b > 1, the random plans hold only their layers
            (low rank comes from the layer's SVD at once, b > 1 has to be fitted).
        deadline: stop building plans then.

    Returns:
        The fitted parameters, and the factors by layer that take the place of the plain scores
        (empty: the plain scores stay).
    """
    count = min(BATCHES, len(engine.order))
    plans = random_plans(engine, engine.aim * target, built, seed)
    with engine.report.stage("random plans", len(plans)) as advance:
        answers = engine.judged("random", plans, count, deadline=deadline, advance=advance)
    known = [(plan, fmean(losses)) for plan, losses in zip(plans, answers, strict=True) if losses]
    sums = np.array([scores_of(engine, plan) for plan, _ in known])
    found = judge(engine.layers, sums, np.array([loss for _, loss in known]), count)
    engine.additivity = found.evidence
    if not found.replaces:
        return found.values, {}
    groups = study.parameter_groups(engine.layers)
    return found.values, study.weights(engine.layers, groups, found.values)


def random_plans(
    engine: Engine, ratio: float, built: Sequence[Choices], seed: int
) -> list[Choices]:
    """Up to PLANS different plans within a predicted ratio: the hull's under random factors."""
    rng = np.random.default_rng(seed)
    known = {name: {plan[name] for plan in built} for name in engine.options()}
    options = {
        name: [o for o in items if o.candidate.num_blocks <= 1 or o.candidate in known[name]]
        for name, items in engine.options().items()
    }
    groups = study.parameter_groups(engine.layers)
    parameters = sorted({g for names in groups.values() for g in names})
    plans: dict[str, Choices] = {}
    for _ in range(2 * PLANS):
        if len(plans) == PLANS:
            break
        values = dict(zip(parameters, rng.normal(0, 1, len(parameters)), strict=True))
        factors = study.weights(engine.layers, groups, values)
        own = 2.0 ** rng.normal(0, 1.5, len(engine.layers))
        weights = {ly.name: factors[ly.name] * w for ly, w in zip(engine.layers, own, strict=True)}
        front = solver.front(options, weights, ties_of(engine.layers))
        choices = front.choices(front.within(ratio * engine.dense_cost * rng.uniform(0.9, 1)))
        plans.setdefault(digest(choices), choices)
    return list(plans.values())


def scores_of(engine: Engine, choices: Choices) -> list[float]:
    """The predicted loss of every layer under a plan."""
    return [engine.scorer.score(layer, choices[layer.name]).loss for layer in engine.layers]


def judge(layers: Sequence[LayerSpec], sums: Floats, losses: Floats, batches: int) -> Additivity:
    """Statistics and fitted factors of plans.

    Args:
        sums: (plans, layers), the layers' predicted losses; losses: (plans,), true.
    """
    usable = (losses > 0) & (sums.sum(axis=1) > 0) if len(losses) else np.zeros(0, bool)
    if usable.sum() < 5:
        return Additivity({}, False, {})
    sums, losses = sums[usable], losses[usable]
    totals = sums.sum(axis=1)
    rank = correlation(totals, losses)
    evidence: dict[str, Any] = {
        "plans": len(losses),
        "batches": batches,
        "rank_correlation": rank,
        "slope": float((totals * losses).sum() / (totals**2).sum()),
    }
    if len(losses) < FEW:
        return Additivity({}, False, evidence)
    values = fit(layers, sums, losses)
    held_out = np.empty(len(losses))
    for fold in range(5):
        test = np.arange(len(losses)) % 5 == fold
        part = fit(layers, sums[~test], losses[~test])
        held_out[test] = sums[test] @ _factors(layers, part)
    fitted = correlation(held_out, losses)
    poor = rank is not None and rank < POOR
    replaces = poor and rank is not None and fitted is not None and fitted > rank + CLEARLY
    evidence |= {"fitted_rank_correlation": fitted, "poor": poor, "fallback": replaces}
    return Additivity(values, replaces, evidence)


def correlation(a: Floats, b: Floats) -> float | None:
    """Spearman's rank correlation, None where one side is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


def _factors(layers: Sequence[LayerSpec], values: Mapping[str, float]) -> Floats:
    weights = study.weights(layers, study.parameter_groups(layers), values)
    return np.array([weights[layer.name] for layer in layers])


def fit(layers: Sequence[LayerSpec], sums: Floats, losses: Floats) -> dict[str, float]:
    """Parameters (log2) that bring weighted sums of scores nearest to true losses.

    Regularised least squares on log losses: parameters are expected within a factor of two,
    losses to scatter by a sixth.
    """
    groups = study.parameter_groups(layers)
    names = sorted({g for found in groups.values() for g in found})
    member = np.array([[n in groups[layer.name] for layer in layers] for n in names], float)

    def residuals(x: Floats) -> Floats:
        log_sum = np.log(sums @ 2.0 ** (x[2:] @ member))
        return np.concatenate([(x[0] + x[1] * log_sum - np.log(losses)) / 0.15, x[2:]])

    bound = study.RANGE
    start = np.concatenate([[np.log(losses).mean() - np.log(sums.sum(1)).mean(), 1.0],
                            np.zeros(len(names))])  # fmt: skip
    low = np.concatenate([[-np.inf, 0.3], np.full(len(names), -bound)])
    high = np.concatenate([[np.inf, 3.0], np.full(len(names), bound)])
    found = least_squares(residuals, start, bounds=(low, high))
    return dict(zip(names, map(float, found.x[2:]), strict=True))
