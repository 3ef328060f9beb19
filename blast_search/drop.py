"""--max-drop alone: the fastest plan whose metric, after retraining, falls by at most that."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from blast_search.closed_loop import meet
from blast_search.decision import decide
from blast_search.engine import Contender
from blast_search.evaluate import worse_by
from blast_search.last_timing import Decision
from blast_search.model_latency import Timing
from blast_search.plan import LayerPlan, Plan
from blast_search.storage import Storage

if TYPE_CHECKING:
    from blast_search.finish import Finish

ROUNDS = 5
AFTER = 3  # contenders that are retrained after the bisection: searched, two uniform plans
KEY = "bisection"


def within_drop(finish: Finish, dense: Timing, storage: Storage) -> Decision:
    """Bisection over the layer ratio, then the whole search at the ratio that it ends with.

    A plan that keeps the metric is tightened, one that does not is relaxed.  The bisection's own
    plan stays among the contenders, so that what the search finds can only be better.
    """
    s, engine = finish.settings, finish.engine
    best = _bisect(finish, dense)
    if best is None:
        nothing = Contender("dense", engine.dense, dense, 1.0, True)
        return Decision(nothing, {}, 1.0, dense, 0, True)
    decision = decide(engine, best.ratio, dense, s.trials, storage, s.seed)
    if not decision.met:  # timed anew, nothing held the ratio: the bisection's plan did
        return replace(decision, winner=best, met=True, weights={})
    if decision.winner.choices != best.choices:
        return replace(decision, baselines=decision.baselines | {KEY: best})
    finish.models.rename(KEY, "searched", best)
    return decision


def _bisect(finish: Finish, dense: Timing) -> Contender | None:
    """The fastest exact plan within the drop; its retrained model is kept."""
    task, engine, limit = finish.prepared.task, finish.engine, finish.settings.max_drop
    assert limit is not None
    best = None
    low, high = 0.0, 1.0
    for _ in range(ROUNDS):
        if best and engine.deadline.expired():
            break
        middle = (low + high) / 2
        contender = meet(engine, "exact", engine.exact, middle)
        if contender is None or not contender.feasible or contender.all_dense:
            low = middle
            continue
        value = _value(finish, contender, middle)
        drop = worse_by(task, value, finish.pipeline.dense_metric)
        finish.report.say(
            f"layer ratio {contender.ratio:.3f}: {task.metric[0]} {value:.4g} "
            f"({drop:+.4g} worse than dense)"
        )
        loss = engine.true_loss("exact", contender.choices)
        engine.note_point(f"exact {middle:.2f}", contender.choices, loss)
        if drop <= limit:
            best, high = replace(contender, name=KEY), contender.ratio
            finish.models.rename("round", KEY, contender)
        else:
            low = middle
    return best


def _value(finish: Finish, contender: Contender, target: float) -> float:
    """The metric after retraining, or before it where there is none."""
    layers = {
        ly.name: LayerPlan.of(ly, contender.choices[ly.name]) for ly in finish.prepared.layers
    }
    plan = Plan(model={}, layers=layers, budget={"layer_target": target})
    steps = finish.models.steps(contender, ROUNDS + AFTER)
    if not steps:
        return finish.models.metric(contender)
    return finish.models.retrained("round", contender, plan, steps, weights=False)
