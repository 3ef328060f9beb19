"""What a winning uniform plan leaves of the budget goes to single layers.

A uniform plan comes in few sizes: the largest one within the budget was seen to leave a tenth of
it unused.  The filled plan gives every layer a candidate that is predicted to lose no more than
the uniform plan's, and is solved for the whole budget.
"""

from __future__ import annotations

from blast_search.closed_loop import CLOSE, bounded, meet
from blast_search.engine import Contender, Engine
from blast_search.last_timing import Decision, final
from blast_search.plan import Choices
from blast_search.space import Candidate, LayerSpec
from blast_search.tables import Option

FILLED = "filled"


def filled(engine: Engine, decision: Decision, uniform: Contender) -> Contender | None:
    """The uniform plan filled up, and timed; None where it leaves little or nothing fits."""
    target = decision.target
    if engine.space.uniform or uniform.all_dense or not uniform.ratio < CLOSE * target:
        return None

    def make(ratio: float) -> Choices:
        return engine.solve(no_worse(engine, uniform.choices), ratio).choices

    if engine.by_time:  # else the ratio is one of sizes, which says nothing about latency
        asked = engine.latency.asked_correction(uniform.choices, uniform.ratio)
        engine.latency.correction = bounded(asked)
    name = f"{FILLED} {uniform.name}"
    found = meet(engine, name, make, target)
    if found is None or not found.feasible or found.choices == uniform.choices:
        return None
    timed = final(engine, found, make, {}, target, decision.dense, decision.trials).winner
    if not timed.feasible or timed.choices == uniform.choices:
        return None
    engine.note_point(name, timed.choices, engine.true_loss(name, timed.choices))
    return timed


def no_worse(engine: Engine, plan: Choices) -> dict[str, list[Option]]:
    """What the solver may choose, as far as a layer is predicted to lose no more than in `plan`.

    The plan's own candidates may be off the grid of ranks, or dominated: they come in again, so
    that the plan itself can be chosen.
    """
    options = engine.options()
    for layer in engine.layers:
        mine = own(engine, layer, plan[layer.name])
        found = [o for o in options[layer.name] if o.loss <= mine.loss]
        options[layer.name] = [o for o in found if o.candidate != mine.candidate] + [mine]
    return options


def own(engine: Engine, layer: LayerSpec, candidate: Candidate) -> Option:
    """A layer's candidate as `engine.options` would have it, also at a rank off the grid."""
    loss = max(engine.scorer.score(layer, candidate).loss, 0.0)
    if not engine.by_time:
        return Option(candidate, engine.size(layer, candidate), loss)
    cost = engine.latency.cost(layer.name, candidate)
    assert cost is not None, "every plan is made of measured block counts"
    return Option(candidate, cost * engine.latency.factor(candidate), loss)
