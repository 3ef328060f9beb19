"""The last timing: the winner beside the uniform plans, until it holds the target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from blast_search.closed_loop import Make, bounded, meet
from blast_search.engine import Contender, Engine
from blast_search.errors import InfeasibleBudgetError
from blast_search.model_latency import Timing
from blast_search.plan import Choices
from blast_search.runfolder import digest

FASTEST = "fastest"  # the plan that is left where no other one holds
FINAL_ROUNDS = 4
FINAL_SECONDS = 40.0
BOLD = 0.95
# A winner that uses so much of the target is large enough.  At 0.94, as in the closed loop, whose
# timings are shorter, 5 % were seen to stay unused (`minilm` at 0.4).
FULL = 0.97
LARGER = 2  # of these rounds may end with a larger plan: noise could ask for one each time


@dataclass(frozen=True)
class Decision:
    """The winner and the best uniform plans, timed side by side with dense."""

    winner: Contender
    baselines: dict[str, Contender]  # "uniform_blast", "uniform_low_rank": those that exist
    target: float  # the largest allowed cost ratio of the layers
    dense: Timing
    trials: int
    met: bool
    make: Make | None = None  # the winner's plans at other ratios
    weights: Mapping[str, float] = field(default_factory=dict)  # of the scores, by layer
    exact: Contender | None = None  # as it was timed first; the fastest plan where none is within


def final(
    engine: Engine,
    winner: Contender,
    make: Make,
    baselines: dict[str, Contender],
    target: float,
    dense: Timing,
    trials: int,
) -> Decision:
    """Time the winner and the uniform plans side by side, until the winner holds the target.

    A winner over it is tightened.  One that leaves much of it unused, because the timings before
    were pessimistic, gets a larger rival, which is tightened where it goes over; the one of least
    true loss stays.
    """
    aim, best = engine.aim, None
    for round_ in range(FINAL_ROUNDS):
        contenders = {"searched": winner} | baselines
        timings = engine.time(
            "final", {k: c.choices for k, c in contenders.items()}, FINAL_SECONDS
        )
        timed = {
            key: replace(
                c, timing=t, ratio=(ratio := engine.measured_ratio(c.choices, t)),
                feasible=ratio <= target,
            )
            for (key, c), t in zip(contenders.items(), timings, strict=True)
        }  # fmt: skip
        winner = timed.pop("searched")
        late = engine.deadline.expired()
        enough = best is not None and (late or _full(best.winner, target))
        decision = Decision(winner, timed, target, timings[0], trials, winner.feasible, make)
        if winner.feasible:
            best = _better(engine, best, decision)
            more = round_ < LARGER and not late
            again = larger(engine, winner, make, target) if more else None
        elif enough or round_ == FINAL_ROUNDS - 1:  # what is tightened now would not be timed
            break
        else:
            engine.report.detail(
                f"  final timing {winner.ratio:.3f} is over {target:.3f}: tightening"
            )
            # Past the deadline in bolder steps: fewer of them.
            step = BOLD if late else 0.99
            aim *= min(step, target / winner.ratio)
            again = meet(engine, winner.name, make, target, aim)
            while again and digest(again.choices) == digest(winner.choices):  # of few sizes
                aim *= BOLD
                again = meet(engine, winner.name, make, target, aim)
        if again is None or (best and digest(again.choices) == digest(best.winner.choices)):
            break
        winner = again
    return best or decision


def _better(engine: Engine, best: Decision | None, other: Decision) -> Decision:
    if best is None:
        return other
    return min(best, other, key=lambda d: engine.true_loss(d.winner.name, d.winner.choices))


def _full(winner: Contender, target: float) -> bool:
    return winner.ratio >= FULL * target


def larger(engine: Engine, winner: Contender, make: Make, target: float) -> Contender | None:
    """A plan that uses what the winner leaves of the target, if that is much; not timed yet."""
    if not engine.by_time or winner.all_dense or _full(winner, target):
        return None
    asked = engine.latency.asked_correction(winner.choices, winner.ratio)
    engine.latency.correction = bounded(asked)
    try:
        choices = make(engine.aim * target)
    except InfeasibleBudgetError:  # a kind that finds some plans only, as samplers do
        return None
    if digest(choices) == digest(winner.choices):
        return None
    engine.report.detail(f"  final timing {winner.ratio:.3f} leaves room below {target:.3f}")
    return replace(winner, choices=choices)


def reachable(fastest: Contender, scope: str, outside: float = 0.0) -> float:
    """The smallest budget that a run could meet, by the fastest plan's timing; rounded up.

    Args:
        outside: what everything but the searched layers takes of the budget's scope.
    """
    ratio, timing = fastest.ratio, fastest.timing
    if scope in ("layers", "model") and timing.ratio_layers > 0:
        # Its own timing will be another one.
        ratio *= max(1.0, timing.ratio_layers_ci95[1] / timing.ratio_layers)
    return math.ceil((outside + min(1.0, ratio) * (1 - outside)) * 1000) / 1000


def why_no_faster(fastest: Choices) -> str:
    """Why no plan is faster than the fastest one."""
    if all(c.is_dense for c in fastest.values()):
        return "no candidate is faster than dense on this device: keep this model dense"
    return "the smallest ranks of the search space still take that much"
