"""Who takes part in `compare`: every kind of plan, as large as the measured budget allows.

Uniform plans come as ladders, the largest plan first.  Their place on the ladder is found by
timing whole models, without a latency table, so that a baseline is never small because a
prediction was off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from blast_search.closed_loop import CLOSE, TIMING_SECONDS, Make, meet
from blast_search.engine import AIM, Contender, Engine
from blast_search.last_timing import FINAL_ROUNDS, FINAL_SECONDS, Decision, larger
from blast_search.plan import Choices
from blast_search.space import DENSE, Candidate
from blast_search.structured import diagonal_choice, monarch_choice

DIAGONAL_BLOCKS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CLIMB_ROUNDS = 8

Ladder = Sequence[Choices]
Again = Callable[[float], Contender | None]


Larger = Callable[[Contender], Contender | None]


@dataclass(frozen=True)
class Entry:
    """One contender, and how to get others of its kind.

    Attributes:
        again: its kind's plan for another share of the target, built and timed.
        larger: the plan that should fill the target, going by this one's timing; not timed.
    """

    contender: Contender
    again: Again | None = None
    larger: Larger | None = None


Extra = Callable[[Engine, float, int], Mapping[str, Entry]]  # target, loss evaluations so far


def line_up(engine: Engine, decision: Decision) -> dict[str, Entry]:
    """All kinds of plans within the decision's target; the fastest of its kind where none is.

    A kind of which the model has no plan is left out; `without_plans` says why.
    """
    target = decision.target
    blocks = [b for b in engine.space.num_blocks if b > 1]
    kinds = {
        "uniform low rank": [uniform_ladder(engine, 1)],
        "block-diagonal": [diagonal_ladder(engine)],
        "Monarch": [monarch_ladder(engine, b) for b in blocks],
        "uniform BLAST": [uniform_ladder(engine, b) for b in blocks],
    }
    entries: dict[str, Entry] = {}
    for name, ladders in kinds.items():
        if found := best_of(engine, name, [ladder for ladder in ladders if ladder], target):
            entries[name] = found
    if decision.exact:
        entries["exact plan"] = solved(engine, decision.exact, engine.exact, target)
    winner, make = decision.winner, decision.make
    searched = solved(engine, winner, make, target) if make else Entry(winner)
    return entries | {"full search": searched}


def without_plans(engine: Engine, entries: Mapping[str, Entry]) -> dict[str, str]:
    """The kinds of structures of which the model has no plan, with the reason."""
    blocks = [b for b in engine.space.num_blocks if b > 1]
    divides = "divides both sides of a layer and saves parameters"
    counts = f"no block count of the search space ({', '.join(map(str, blocks))}) {divides}"
    counts = counts if blocks else "the search space has no block count above 1"
    reasons = {
        "uniform low rank": "no rank saves parameters in any layer",
        "block-diagonal": f"no block count of {', '.join(map(str, DIAGONAL_BLOCKS))} {divides}",
        "Monarch": counts,
        "uniform BLAST": counts,
    }
    return {kind: reason for kind, reason in reasons.items() if kind not in entries}


def level(engine: Engine, entries: Mapping[str, Entry], target: float) -> dict[str, Contender]:
    """Time all contenders side by side; those over the target get smaller plans, and again.

    Single timings before may have been pessimistic: once, those that leave room get larger plans,
    which they lose again if they do not hold.

    Returns:
        The contenders with their final timing.  One whose kind has no smaller plan stays over the
        target (feasible=False).
    """
    entries = dict(entries)
    aims = dict.fromkeys(entries, AIM)
    timed: dict[str, Contender] = {}
    held: dict[str, Contender] = {}  # the plans before, of contenders that got larger ones
    for round_ in range(FINAL_ROUNDS):
        plans = {name: e.contender.choices for name, e in entries.items()}
        timings = engine.time("side by side", plans, FINAL_SECONDS * max(1.0, len(plans) / 3))
        for (name, e), timing in zip(entries.items(), timings, strict=True):
            ratio = engine.measured_ratio(e.contender.choices, timing)
            timed[name] = replace(
                e.contender, timing=timing, ratio=ratio, feasible=ratio <= target
            )
        if round_ == FINAL_ROUNDS - 1:
            break
        changed = False
        for name, c in timed.items():
            entry, new = entries[name], None
            if not c.feasible and name in held:
                new = held.pop(name)
            elif not c.feasible:
                aims[name] *= min(0.99, target / c.ratio)
                new = entry.again(aims[name]) if entry.again else None
            elif round_ == 0 and entry.larger and (new := entry.larger(c)):
                held[name] = c
            if new and new.choices != c.choices:
                entries[name] = replace(entry, contender=new)
                changed = True
        if not changed:
            break
    return timed


def solved(engine: Engine, contender: Contender, make: Make, target: float) -> Entry:
    """A contender whose kind comes from `make`."""

    def again(aim: float) -> Contender | None:
        engine.latency.correction = 1.0
        return meet(engine, contender.name, make, target, aim)

    return Entry(contender, again, lambda c: larger(engine, c, make, target))


# ---- ladders ----------------------------------------------------------------------------------


def best_of(engine: Engine, name: str, ladders: Sequence[Ladder], target: float) -> Entry | None:
    """Of each ladder the largest plan within the target; of these the one of least true loss."""
    found: list[tuple[bool, float, Contender, Ladder]] = []
    for ladder in ladders:
        c = climb(engine, name, ladder, target)
        # Only plans within the target are built and judged; among others, the fastest is shown.
        judged = engine.true_loss(name, c.choices) if c.feasible else c.ratio
        found.append((not c.feasible, judged, c, ladder))
    if not found:
        return None
    _, _, contender, best = min(found, key=lambda item: item[:2])
    return Entry(
        contender,
        lambda aim: climb(engine, name, best, target, aim),
        lambda c: higher(engine, c, best, target),
    )


def climb(engine: Engine, name: str, ladder: Ladder, target: float, aim: float = AIM) -> Contender:
    """The largest plan of a ladder whose measured ratio is at most aim * target.

    Regula falsi on the ladder's sizes, every other step a bisection; stops when `CLOSE` of the
    target is used.  The fastest plan that was timed where none is within the target.
    """
    sizes = [_size(engine, choices) for choices in ladder]
    over, within = -1, len(ladder)  # ladder[over] is too slow, ladder[within] is not
    known = {over: (1.0, 1.0), within: (0.0, 0.0)}  # place -> (size, measured ratio)
    tried: dict[int, Contender] = {}
    wanted = aim * target
    with engine.report.stage(f"build and time {name}", CLIMB_ROUNDS) as advance:
        for step in range(CLIMB_ROUNDS):
            (s0, r0), (s1, r1) = known[within], known[over]
            slope = (s1 - s0) / (r1 - r0) if r1 > r0 else 0.0
            size = (s0 + s1) / 2 if step % 2 or not slope else s0 + (wanted - r0) * slope
            place = next((i for i, s in enumerate(sizes) if s <= size), within)
            place = min(max(place, over + 1), within - 1)
            tried[place] = timed_plan(engine, name, ladder[place], target)
            ratio = tried[place].ratio
            known[place] = sizes[place], ratio
            advance()
            if ratio > wanted:
                over = place
            else:
                within = place
            if within - over <= 1 or CLOSE * wanted <= ratio <= wanted:
                break
    return tried.get(within) or min(tried.values(), key=lambda c: c.ratio)


def higher(engine: Engine, c: Contender, ladder: Ladder, target: float) -> Contender | None:
    """As `larger` (last_timing.py), on a ladder: time is taken to be proportional to size."""
    wanted = AIM * target / c.ratio * _size(engine, c.choices)
    found = next((plan for plan in ladder if _size(engine, plan) <= wanted), c.choices)
    return None if c.ratio >= CLOSE * target else replace(c, choices=found)


def timed_plan(engine: Engine, name: str, choices: Choices, target: float) -> Contender:
    (timing,) = engine.time(name, {name: choices}, TIMING_SECONDS)
    ratio = engine.measured_ratio(choices, timing)
    return Contender(name, choices, timing, ratio, ratio <= target)


def _size(engine: Engine, choices: Choices) -> float:
    """Share of the searched layers' parameters that a plan keeps."""
    kept = sum(layer.params(choices[layer.name]) for layer in engine.layers)
    return kept / sum(layer.params(DENSE) for layer in engine.layers)


def uniform_ladder(engine: Engine, num_blocks: int) -> Ladder:
    """One b and one parameter fraction for all layers (b = 1: low rank)."""
    return _ladder([engine.uniform(num_blocks, keep) for keep in engine.space.fractions()])


def monarch_ladder(engine: Engine, num_blocks: int) -> Ladder:
    """One b and one parameter fraction for all layers."""
    multiple = engine.space.rank_multiple
    return _ladder(
        [
            {
                ly.name: monarch_choice(*ly.shape, num_blocks, keep, multiple) or DENSE
                for ly in engine.layers
            }
            for keep in engine.space.fractions()
        ]
    )


def diagonal_ladder(engine: Engine) -> Ladder:
    """b dense diagonal blocks in every layer that b divides."""
    return _ladder(
        [
            {ly.name: diagonal_choice(*ly.shape, b) or DENSE for ly in engine.layers}
            for b in DIAGONAL_BLOCKS
        ]
    )


def _ladder(plans: Sequence[Mapping[str, Candidate]]) -> Ladder:
    """Distinct plans, those that replace nothing left out."""
    ladder: list[Choices] = []
    for choices in plans:
        if choices not in ladder and any(not c.is_dense for c in choices.values()):
            ladder.append(choices)
    return ladder
