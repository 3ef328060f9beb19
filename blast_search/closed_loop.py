"""The closed loop: solve, build, time, correct, solve again, until the measured ratio holds."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from statistics import median

from blast_search.engine import Contender, Engine
from blast_search.errors import BlastSearchError, InfeasibleBudgetError
from blast_search.model_latency import Timing
from blast_search.plan import Choices
from blast_search.runfolder import digest
from blast_search.solver import least

CLOSE = 0.94  # a plan that uses this much of its budget is close enough
ROUNDS = 6
TIMING_SECONDS = 8.0
DOUBT = 0.1  # a timing that is so far from its prediction, relatively, is made again, for longer

Make = Callable[[float], Choices]  # predicted ratio -> choices; InfeasibleBudgetError if none


def meet(
    engine: Engine, name: str, make: Make, target: float, aim: float | None = None
) -> Contender | None:
    """Solve, build, time, correct, solve again, until the *measured* ratio meets `target`.

    Args:
        aim: the share of the target to solve for; default: `engine.aim`.

    Returns:
        The slowest plan within the target (the best use of the budget), else the fastest
        one measured, with feasible=False; None if nothing could be solved for.
    """
    return meet_together(engine, {name: make}, target, aim)[name]


def meet_together(
    engine: Engine, makes: Mapping[str, Make], target: float, aim: float | None = None
) -> dict[str, Contender | None]:
    """`meet` for several kinds of plans at once, timed side by side.

    Dense, which takes longest, is timed once for all of them.  Each kind has a correction of its
    own; the latency model is left with the last one's.
    """
    loops = {name: _rounds(engine, make, name, target, aim) for name, make in makes.items()}
    corrections = dict.fromkeys(makes, engine.latency.correction)
    asked: dict[str, tuple[Choices, float]] = {}
    found: dict[str, Contender | None] = {}

    def resume(name: str, timing: Timing | None) -> None:
        engine.latency.correction = corrections[name]
        try:
            asked[name] = loops[name].send(timing)
        except StopIteration as end:
            found[name] = end.value
            asked.pop(name, None)
        corrections[name] = engine.latency.correction

    what = f"{len(makes)} kinds of plans" if len(makes) > 1 else next(iter(makes))
    with engine.report.stage(f"build and time {what}", ROUNDS) as advance:
        for name in makes:
            resume(name, None)
        while asked:
            plans = {name: choices for name, (choices, _) in asked.items()}
            # As many rounds as one plan alone would get: it takes a third of each, with dense.
            seconds = max(s for _, s in asked.values()) * (2 + len(plans)) / 3
            timings = engine.time(", ".join(plans), plans, seconds)
            for name, timing in zip(plans, timings, strict=True):
                resume(name, timing)
            advance()
    engine.latency.correction = corrections[next(reversed(corrections))]
    return found


def _rounds(
    engine: Engine, make: Make, name: str, target: float, aim: float | None
) -> Generator[tuple[Choices, float], Timing | None, Contender | None]:
    """One kind's loop: yields a plan and for how many seconds to time it, is sent the timing."""
    tightened, aim = aim is not None, aim or engine.aim
    tried: dict[str, Contender] = {}
    factors: list[float] = []  # the correction that each timed plan asks for
    for _ in range(ROUNDS):
        if engine.deadline.expired() and any(c.feasible for c in tried.values()):
            break
        try:
            choices = make(aim * target)
        except InfeasibleBudgetError:
            if tried or tightened or not engine.by_time:
                break
            # By the table alone, which has not been held against this kind's plans yet.
            choices = _fastest(make)
            if all(c.is_dense for c in choices.values()):
                break
        predicted = engine.predicted_ratio(choices)
        assert predicted is not None
        if digest(choices) in tried:  # timed already: no new evidence would come
            break
        timing = yield choices, TIMING_SECONDS
        assert timing
        measured = engine.measured_ratio(choices, timing)
        doubtful = engine.by_time and abs(measured / predicted - 1) > DOUBT
        if doubtful and not engine.deadline.expired():
            # Other load for seconds was seen to move a ratio from 0.22 to 0.29.
            timing = yield choices, 2 * TIMING_SECONDS
            assert timing
            measured = engine.measured_ratio(choices, timing)
        if engine.by_time:  # sizes are counted: there is no prediction to judge
            engine.rounds.append(
                {"plan": name, "predicted_ratio": predicted, "measured_ratio": measured}
            )
        engine.report.detail(f"  {name}: predicted ratio {predicted:.3f}, measured {measured:.3f}")
        contender = Contender(name, choices, timing, measured, measured <= target)
        tried[digest(choices)] = contender
        if not engine.by_time or contender.all_dense:
            break
        factors.append(engine.latency.asked_correction(choices, measured))
        # The median over rounds: following each single timing would chase its noise.
        engine.latency.correction = bounded(median(factors))
        estimate = engine.predicted_ratio(choices) or measured
        if CLOSE * target <= min(estimate, measured) <= max(estimate, measured) <= target:
            break
    return _best(engine, list(tried.values()), target)


def _fastest(make: Make) -> Choices:
    """The plan of a kind of least predicted ratio; an empty one where there is none."""
    try:
        return least(make)[1]
    except BlastSearchError:  # there is none, or none that was found in time
        return {}


def bounded(correction: float) -> float:
    """A correction of the latency table that no single wild timing can make absurd."""
    return min(max(correction, 0.2), 5.0)


def _best(engine: Engine, tried: list[Contender], target: float) -> Contender | None:
    """The slowest plan that is within the target by estimate and by its own timing.

    Picking by single timings alone would favour plans whose timing was lucky.
    """
    estimates = [(engine.predicted_ratio(c.choices) or c.ratio, c) for c in tried]
    within = [(ratio, c) for ratio, c in estimates if c.feasible and ratio <= target]
    if within:
        return max(within, key=lambda item: item[0])[1]
    feasible = [c for c in tried if c.feasible]
    return min(feasible or tried, key=lambda c: c.ratio, default=None)
