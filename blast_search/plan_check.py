"""Predicted against measured model latency, on random plans that the fit has not seen.

Rivals publish misses of 8 % to 35 % of a sum of layer timings; every run measures its own.  The
measured plans then correct the latency model (`fit_factors`); the error that is reported is
cross-validated: each plan is predicted by a fit to the plans of the other folds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from blast_search.latency_model import (
    LatencyModel,
    Shares,
    error_statistics,
    fit_factors,
    replaced,
)
from blast_search.layers import Workload
from blast_search.model_latency import Timing, time_variants, untrained
from blast_search.plan import Choices
from blast_search.progress import Reporter
from blast_search.runfolder import RunFolder, digest
from blast_search.space import DENSE, Candidate

PLANS = 20
FOLDS = 4
CHECKED = ("plans", "median", "worst", "uncorrected_median", "uncorrected_worst")
GROUP = 4  # plans built and timed at once: all of them would fill the memory
GROUP_SECONDS = 2.0
GROUP_ROUNDS = (5, 12)  # at least and at most
SPREAD = 0.15  # of a layer's latency ratio around its plan's


@dataclass(frozen=True)
class CheckedPlan:
    """A random plan and its measured latency, with dense and skeleton timed beside it."""

    choices: Choices
    shares: Shares
    measured_ratio_layers: float
    measured_ms: float
    dense_ms: float
    fixed_ms: float

    def model_ms(self, ratio_layers: float) -> float:
        return self.fixed_ms + ratio_layers * (self.dense_ms - self.fixed_ms)


def random_plans(latency: LatencyModel, count: int, seed: int) -> list[dict[str, Candidate]]:
    """Plans over the whole range of latencies, every layer drawn for itself.

    Each plan has a ratio that its layers scatter around, so that sums differ, not only terms.
    """
    draw = random.Random(seed)
    plans = []
    for index in range(count):
        aim = 0.15 + 0.75 * (index + draw.random()) / count  # stratified
        plan = {}
        for layer in latency.layers:
            costs = latency.costs(layer.name)
            options = sorted(costs)
            dense = costs[DENSE]
            weights = [math.exp(-abs(costs[c] / dense - aim) / SPREAD) for c in options]
            plan[layer.name] = draw.choices(options, weights)[0]
        plans.append(plan)
    draw.shuffle(plans)
    return plans


def measure_plans(
    model: nn.Module,
    latency: LatencyModel,
    workloads: Sequence[Workload],
    records: RunFolder,
    report: Reporter,
    seed: int = 0,
    count: int = PLANS,
    mode: str = "eager",
    expired: Callable[[], bool] = lambda: False,
) -> list[CheckedPlan]:
    """Time random plans, a few at once, interleaved with dense; fewer if time has expired."""
    layers = latency.layers
    plans = random_plans(latency, count, seed)
    checked: list[CheckedPlan] = []
    with report.stage("check predicted latency", count) as advance:
        for first in range(0, count, GROUP):
            group = plans[first : first + GROUP]
            if expired():
                break

            def measure(group: list[dict[str, Candidate]] = group) -> list[list[float]]:
                variants = {str(i): untrained(model, layers, plan) for i, plan in enumerate(group)}
                timings = time_variants(
                    model, layers, variants, workloads, GROUP_SECONDS, *GROUP_ROUNDS, mode
                )
                return [_numbers(timings[str(i)]) for i in range(len(group))]

            key = "+".join(digest(plan) for plan in group)
            rows = records.once("random plans", key, f"random {first}", measure)
            for plan, row in zip(group, rows, strict=True):
                shares = latency.shares(plan)
                assert shares is not None, "random plans are made of measured candidates"
                checked.append(CheckedPlan(plan, shares, *row))
                advance()
    return checked


def _numbers(t: Timing) -> list[float]:
    return [t.ratio_layers, t.median_ms, t.dense_ms, t.fixed_ms]


def cross_validated(checked: Sequence[CheckedPlan], folds: int = FOLDS) -> dict[str, float]:
    """Relative error of the predicted model latency on plans outside the fit.

    Returns:
        plans, median, worst, bias (error_statistics) of the better prediction: with a fit to the
        plans of the other folds (`corrected` = 1), or, where noise makes that worse, the bare sum
        of cells (0).  `uncorrected_median` and `uncorrected_worst` are those of the bare sum.
    """
    if not checked:
        return {}
    fitted, bare = [], []
    for fold in range(folds):
        rest = [c for i, c in enumerate(checked) if i % folds != fold]
        factors = fit_factors([(c.shares, c.measured_ratio_layers) for c in rest])
        for c in checked[fold::folds]:
            ratio = c.shares.get(0, 0.0) + replaced(c.shares, factors)
            fitted.append((c.model_ms(ratio), c.measured_ms))
            bare.append((c.model_ms(sum(c.shares.values())), c.measured_ms))
    with_fit, without = error_statistics(fitted), error_statistics(bare)
    better = with_fit["median"] < without["median"]
    return dict(with_fit if better else without) | {
        "corrected": float(better),
        "uncorrected_median": without["median"],
        "uncorrected_worst": without["worst"],
    }


def correction(checked: Sequence[CheckedPlan]) -> dict[int, float]:
    """Factors for the latency model: a fit to all plans where that predicts others better."""
    if not cross_validated(checked).get("corrected"):
        return {}
    return fit_factors([(c.shares, c.measured_ratio_layers) for c in checked])


def check_text(found: Mapping[str, float]) -> str:
    """The result of `cross_validated` in one sentence."""
    return (
        f"On {found['plans']:.0f} random plans outside the fit, predicted model latency differed "
        f"from measured by {found['median']:.1%} (median), {found['worst']:.1%} (worst); without "
        f"the correction by whole models, {found['uncorrected_median']:.1%} and "
        f"{found['uncorrected_worst']:.1%}."
    )
