"""From tables to the winning plan: contenders, trials, the closed loop and the last timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from blast_search import additivity
from blast_search.closed_loop import CLOSE, Make, meet, meet_together
from blast_search.engine import Contender, Engine
from blast_search.errors import InfeasibleBudgetError
from blast_search.judge import BROKEN
from blast_search.last_timing import (
    FASTEST,
    FINAL_SECONDS,
    Decision,
    final,
    reachable,
    why_no_faster,
)
from blast_search.model_latency import Timing
from blast_search.plan import Choices
from blast_search.runfolder import digest
from blast_search.storage import Storage
from blast_search.trials import FRONT_BUDGETS, Trials, Tuned, evaluate_front

FRONT_SHARE = 0.25  # of the time that is left to the search
NEAR = 1.5  # times the least predicted loss of a uniform plan: further off, b is not judged
# Times the least true loss: retraining may turn the order of such plans round.  It was 1.1; but on
# `smollm2` at 0.5 the exact plan, 1.15 times as far off, led after 20 steps (results/compare).
RIVAL = 1.25

Pool = dict[
    str, tuple[Contender, Make]
]  # name -> a plan within the target, and others of its kind
Kinds = Mapping[str, tuple[str, Make]]  # key among the baselines -> name, maker of plans


def decide(
    engine: Engine,
    target: float,
    dense: Timing,
    trials: int,
    storage: Storage,
    seed: int,
    recovered: Callable[[Contender], float] | None = None,
) -> Decision:
    """The best plan within `target`, never worse in true loss than a uniform plan within it.

    Args:
        recovered: how far a plan stays behind dense after a short retraining; it decides between
            the exact plan and the searched one where their true losses are close.
    """
    kinds = uniform_kinds(engine, target)
    first = first_plans(engine, target, kinds)
    correction = engine.latency.correction
    uniforms = uniform_contenders(engine, target, kinds, first)
    baselines = {key: contender for key, (contender, _) in uniforms.items()}
    exact = first["exact"]
    make: Make = engine.exact
    if exact is None or not exact.feasible:
        exact, make = _fastest(engine, exact, target)
    plans: list[tuple[str, Contender, Make]] = [("exact", exact, make)]
    plans += [(contender.name, contender, made) for contender, made in uniforms.values()]
    pool: Pool = {name: (c, made) for name, c, made in plans if c.feasible}
    if not pool:
        nearest = min([exact, *baselines.values()], key=lambda c: c.ratio)
        return Decision(nearest, baselines, target, dense, 0, False, exact=exact)
    engine.note_point("dense", engine.dense, 0.0)
    tuned: Tuned | None = None
    weights: Mapping[str, float] = {}
    if exact.feasible:
        loss = engine.true_loss("exact", exact.choices)
        engine.note_point(f"exact {target:.2f}", exact.choices, loss)
        if not (exact.all_dense or engine.space.uniform):
            built = [c.choices for c in (exact, *baselines.values())]
            tuned, weights = _tuned(engine, target, built, trials, storage, seed)
    if weights:
        searched: Make = lambda ratio: _searched(engine, ratio, tuned, weights)  # noqa: E731
        contender = meet(engine, "searched", searched, target)
        if contender and contender.feasible:
            pool["searched"] = (contender, searched)
    order, trained = _ordered(engine, pool, recovered)
    first_loss = _loss(engine, pool[order[0]][0])
    decisions: list[Decision] = []

    def timed(contender: Contender, make: Make, weights: Mapping[str, float]) -> None:
        # A uniform winner stands for its kind: the baseline is what the last timing makes of it.
        own = [key for key, c in baselines.items() if c.name == contender.name]
        others = {key: c for key, c in baselines.items() if key not in own}
        count = tuned.trials if tuned else 0
        found = final(engine, contender, make, others, target, dense, count)
        named = found.baselines | dict.fromkeys(own, found.winner)
        decisions.append(replace(found, baselines=named, weights=weights, exact=exact))

    def recovers() -> bool:
        # What retraining said of a plan does not hold for a smaller one: on `minilm` at 0.3 the
        # exact plan, which had recovered better, was tightened, and ended 9 % behind the other.
        return trained and decisions[0].met and _loss(engine, decisions[0].winner) <= first_loss

    for name in order:  # the last timing may refuse a plan and all that its kind has to offer
        contender, make = pool[name]
        met = next((d.winner for d in decisions if d.met), None)
        if met and (recovers() or not _behind(engine, met, contender)):
            continue
        timed(contender, make, weights if name == "searched" else {})
    if not any(d.met for d in decisions) and exact.name != FASTEST:
        fastest, _ = _fastest(engine, None, target)
        timed(fastest, engine.exact, {})
        if (last := decisions[-1]).winner.choices != fastest.choices:  # it left room
            decisions[-1] = replace(last, winner=replace(last.winner, name="exact"))
    engine.latency.correction = correction  # for what is predicted from here on, also by pareto
    if recovers():  # this counts for more than the true loss before retraining
        return decisions[0]
    best = min(decisions, key=lambda d: (not d.met, _loss(engine, d.winner), d.winner.ratio))
    return _not_worse(engine, best, {key: made for key, (_, made) in uniforms.items()})


def _loss(engine: Engine, contender: Contender) -> float:
    """True loss, of a plan within the target: no other one is judged."""
    return engine.true_loss(contender.name, contender.choices) if contender.feasible else 0.0


def _behind(engine: Engine, met: Contender, other: Contender) -> bool:
    """Whether a plan that the last timing made smaller fell behind one that is not uniform.

    The uniform plans are timed beside it in any case (_not_worse).
    """
    return not other.name.startswith("uniform") and _loss(engine, other) < _loss(engine, met)


def _tuned(
    engine: Engine,
    target: float,
    built: Sequence[Choices],
    trials: int,
    storage: Storage,
    seed: int,
) -> tuple[Tuned | None, Mapping[str, float]]:
    """What the trials found, if there were any, and the weights of the scores that are best."""
    deadline = engine.deadline
    with engine.panel.session(additivity.PLANS + len(FRONT_BUDGETS) + trials):
        found, weights = additivity.check(
            engine, target, built, seed, deadline.share(additivity.SHARE)
        )
        evaluate_front(engine, target, weights, deadline.share(FRONT_SHARE))
        tuned = None
        if trials:
            tuned = Trials(engine, target, storage, seed).run(trials, found, deadline)
    return tuned, tuned.weights if tuned else weights


def _ordered(
    engine: Engine, pool: Pool, recovered: Callable[[Contender], float] | None
) -> tuple[list[str], bool]:
    """The names in `pool`, best first, and whether a short retraining decided on the first."""
    losses = {
        key: engine.true_loss(key, contender.choices) for key, (contender, _) in pool.items()
    }
    engine.report.say(
        "true loss on calibration data: "
        + ", ".join(f"{key} {value:.4g}" for key, value in losses.items())
    )
    order = sorted(pool, key=lambda key: losses[key])
    close = rivals({key: contender for key, (contender, _) in pool.items()}, losses)
    if recovered is None or order[0] not in close:
        return order, False
    behind = {key: recovered(pool[key][0]) for key in close}
    if min(behind.values()) >= BROKEN:
        return order, False
    engine.report.say(
        "behind dense after a short retraining: "
        + ", ".join(f"{key} {value:.4g}" for key, value in behind.items())
    )
    first = min(close, key=lambda key: (behind[key], losses[key]))
    return [first, *(key for key in order if key != first)], True


def rivals(pool: Mapping[str, Contender], losses: Mapping[str, float]) -> list[str]:
    """The exact and the searched plan, where they differ and both are close to the best."""
    limit = RIVAL * min(losses.values())
    close = [key for key in ("exact", "searched") if key in pool and losses[key] <= limit]
    same = len({digest(pool[key].choices) for key in close}) < 2
    return [] if same else close


def _not_worse(engine: Engine, decision: Decision, makers: Mapping[str, Make]) -> Decision:
    """The decision, or a uniform plan within the target that has a lower true loss.

    The last timing may have tightened the winner so far that it lost its lead.

    Args:
        makers: what makes the uniform plans, by their key among the baselines.
    """
    key, best = "", decision.winner
    for other, contender in decision.baselines.items():
        loss = engine.true_loss(contender.name, contender.choices) if contender.feasible else None
        if loss is not None and loss < engine.true_loss(best.name, best.choices):
            key, best = other, contender
    if not key or best.choices == decision.winner.choices:
        return decision
    return replace(decision, winner=replace(best), met=True, make=makers[key], weights={})


def _searched(
    engine: Engine, ratio: float, tuned: Tuned | None, weights: Mapping[str, float]
) -> Choices:
    """The best plan of the trials where it fits the ratio, else one near it that does.

    The trials were solved with the correction of their time: where a later one leaves their best
    plan far below the ratio, a larger plan near it takes its place.
    """
    if not tuned:
        return engine.exact(ratio, weights)
    predicted = engine.predicted_ratio(tuned.choices)
    if predicted is None or predicted > ratio * (1 + 1e-9):
        return tuned.near(ratio)
    if predicted >= CLOSE * ratio:
        return tuned.choices
    larger = tuned.near(ratio)
    reached = engine.predicted_ratio(larger)
    if not reached or predicted >= CLOSE * reached:
        return tuned.choices
    # A plan near a move may have lost what the move gained.
    return min((tuned.choices, larger), key=lambda plan: engine.true_loss("searched", plan))


def first_plans(engine: Engine, target: float, kinds: Kinds) -> dict[str, Contender | None]:
    """The best uniform plans and the exact plan within the target, by name; None: no such plan.

    The latency model is left with the exact plan's correction.
    """
    engine.latency.correction = 1.0
    makes = {name: make for name, make in kinds.values()}
    return meet_together(engine, makes | {"exact": engine.exact}, target)


def uniform_kinds(engine: Engine, target: float) -> Kinds:
    """Uniform low rank and uniform BLAST (b > 1)."""
    blocks = best_blocks(engine, target)
    return {
        "uniform_low_rank": ("uniform low rank", lambda r: engine.largest_uniform(1, r)),
        "uniform_blast": ("uniform BLAST", lambda r: engine.best_uniform(r, blocks)),
    }


def _blocks(engine: Engine) -> list[int]:
    return [b for b in engine.space.num_blocks if b > 1]


def best_blocks(engine: Engine, target: float) -> list[int]:
    """The block count above 1 whose uniform plan has the least true loss, as a list of one.

    Predictions only say which are worth judging (within `NEAR`).  All block counts where none has
    a plan within the target by the uncorrected table: measurements may see one.
    """
    engine.latency.correction = 1.0
    blocks = _blocks(engine)
    plans: dict[int, Choices] = {}
    for b in blocks:
        with suppress(InfeasibleBudgetError):
            plans[b] = engine.best_uniform(engine.aim * target, [b])
    predicted = {b: engine.predicted_loss(choices) for b, choices in plans.items()}
    near = [b for b in plans if predicted[b] <= NEAR * min(predicted.values())]
    if not near:
        return blocks
    losses = {b: predicted[b] for b in near}
    if len(near) > 1:
        with engine.report.stage("judge uniform BLAST plans", len(near)) as advance:
            found = engine.judged(
                "uniform BLAST", [plans[b] for b in near], deadline=engine.deadline,
                advance=advance,
            )  # fmt: skip
        losses = {b: fmean(v) for b, v in zip(near, found, strict=True) if v} or losses
    return [min(losses, key=losses.__getitem__)]


def uniform_contenders(
    engine: Engine, target: float, kinds: Kinds, met: Mapping[str, Contender | None]
) -> dict[str, tuple[Contender, Make]]:
    """The uniform plans among `first_plans`, each with what makes its kind at other ratios."""
    found: dict[str, tuple[Contender, Make]] = {}
    for key, (name, make) in kinds.items():
        contender = met[name]
        if contender is None and key == "uniform_blast" and (blocks := _blocks(engine)):
            # None is fast enough on this device: the fastest one is shown, over the budget.
            choices = engine.fastest_uniform(blocks)
            with engine.latency.kept():
                contender = meet(engine, name, lambda _, c=choices: c, target) if choices else None  # type: ignore[misc]
        if contender and not contender.all_dense:
            found[key] = contender, make
            loss = engine.true_loss(name, contender.choices)
            blocks_used = max(c.num_blocks for c in contender.choices.values())
            engine.note_point(f"uniform b{blocks_used}", contender.choices, loss)
    return found


def _fastest(engine: Engine, exact: Contender | None, target: float) -> tuple[Contender, Make]:
    """The fastest plan there is, measured: the last resort, and what an infeasible budget gets."""
    choices = engine.fastest()
    (timing,) = engine.time(FASTEST, {FASTEST: choices}, FINAL_SECONDS)
    ratio = engine.measured_ratio(choices, timing)
    fastest = Contender(FASTEST, choices, timing, ratio, ratio <= target)
    if exact is not None and exact.ratio < ratio:
        fastest = exact
    return fastest, lambda _: fastest.choices


def infeasible(
    run: Path,
    scope: str,
    budget: float,
    decision: Decision,
    outside: float,
    every_workload: bool = False,
) -> InfeasibleBudgetError:
    """The error for a decision that does not meet its budget; `outside`: see `layer_target`."""
    reason = why_no_faster(decision.winner.choices)
    if decision.target <= 0 and not decision.winner.all_dense:
        reason = f"everything outside the searched layers alone takes {outside:.2f} of dense"
    if decision.dense.fixed_ms >= decision.dense.dense_ms:
        reason = "the searched layers take no measurable part of the model's time: keep it dense"
    smallest = reachable(decision.winner, scope, outside)
    each = " on each workload" if every_workload else ""
    return InfeasibleBudgetError(
        f"no plan meets budget {budget:g} (scope {scope}){each}: the smallest reachable budget "
        f"is about {smallest:.3f}; {reason}. The nearest plan is in {run / 'plan.json'}."
    )
