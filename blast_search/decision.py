"""From tables to the winning plan: contenders, trials, the closed loop and the last timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from blast_search import additivity
from blast_search.closed_loop import CLOSE, Make, bounded, meet
from blast_search.deadline import Deadline
from blast_search.engine import Contender, Engine
from blast_search.errors import InfeasibleBudgetError
from blast_search.model_latency import Timing
from blast_search.plan import Choices
from blast_search.runfolder import digest
from blast_search.space import DENSE
from blast_search.study import Storage
from blast_search.trials import FRONT_BUDGETS, Trials, Tuned, evaluate_front

FINAL_ROUNDS = 4
FINAL_SECONDS = 40.0
LARGER = 2  # of these rounds may end with a larger plan: noise could ask for one each time
FRONT_SHARE = 0.25  # of the time that is left to the search
RIVAL = 1.1  # times the least true loss: retraining may turn the order of such plans round


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


def layer_target(scope: str, budget: float, dense: Timing, share: float) -> float:
    """The budget as a ratio of the searched layers alone.

    Args:
        share: what the searched layers hold of the whole model's MACs or parameters.
    """
    match scope:
        case "layers":
            return budget
        case "model":
            span = dense.dense_ms - dense.fixed_ms
            return (budget * dense.dense_ms - dense.fixed_ms) / span
        case _:
            return (budget - (1 - share)) / share


def scope_ratio(scope: str, ratio: float, dense: Timing, share: float) -> float:
    """The inverse of `layer_target`: a ratio of the layers in the unit of the budget's scope."""
    match scope:
        case "layers":
            return ratio
        case "model":
            span = dense.dense_ms - dense.fixed_ms
            return (dense.fixed_ms + ratio * span) / dense.dense_ms
        case _:
            return 1 - share + ratio * share


def decide(
    engine: Engine,
    target: float,
    dense: Timing,
    trials: int,
    storage: Storage,
    seed: int,
    deadline: Deadline,
    recovered: Callable[[Contender], float] | None = None,
) -> Decision:
    """The best plan within `target`, never worse in true loss than a uniform plan within it.

    Args:
        recovered: how far a plan stays behind dense after a short retraining; it decides between
            the exact plan and the searched one where their true losses are close.
    """
    baselines = uniform_contenders(engine, target)
    exact = meet(engine, "exact", engine.exact, target)
    make: Make = engine.exact
    if exact is None or not exact.feasible:
        exact, make = _fastest(engine, exact, target)
        if not exact.feasible:
            return Decision(exact, baselines, target, dense, 0, False)
    pool: dict[str, tuple[Contender, Make]] = {"exact": (exact, make)}
    loss = engine.true_loss("exact", exact.choices)
    engine.note_point("dense", {layer.name: DENSE for layer in engine.layers}, 0.0)
    engine.note_point(f"exact {target:.2f}", exact.choices, loss)
    done, weights, tuned = 0, dict[str, float](), None
    if not (exact.all_dense or engine.space.uniform):
        built = [c.choices for c in (exact, *baselines.values())]
        with engine.panel.session(additivity.PLANS + len(FRONT_BUDGETS) + trials):
            found, weights = additivity.check(
                engine, target, built, seed, deadline.share(additivity.SHARE)
            )
            evaluate_front(engine, target, weights, deadline.share(FRONT_SHARE))
            if trials:
                tuned = Trials(engine, target, storage, seed).run(trials, found, deadline)
        if tuned:
            done, weights = tuned.trials, tuned.weights
        if weights:
            made: Make = lambda ratio: _searched(engine, ratio, tuned, weights)  # noqa: E731
            contender = meet(engine, "searched", made, target)
            if contender and contender.feasible:
                pool["searched"] = (contender, made)
    for contender in baselines.values():
        if contender.feasible:
            pool[contender.name] = (contender, lambda _, c=contender: c.choices)  # type: ignore[misc]
    losses = {
        name: engine.true_loss(name, contender.choices) for name, (contender, _) in pool.items()
    }
    engine.report.say(
        "true loss on calibration data: "
        + ", ".join(f"{key} {value:.4f}" for key, value in losses.items())
    )
    name = min(pool, key=lambda key: losses[key])
    close = rivals({key: contender for key, (contender, _) in pool.items()}, losses)
    if recovered and name in close:
        behind = {key: recovered(pool[key][0]) for key in close}
        name = min(close, key=lambda key: (behind[key], losses[key]))
        engine.report.say(
            "behind dense after a short retraining: "
            + ", ".join(f"{key} {value:.4f}" for key, value in behind.items())
        )
    winner, make = pool[name]
    decision = final(engine, winner, make, baselines, target, dense, done)
    return _not_worse(engine, replace(decision, weights=weights if name == "searched" else {}))


def rivals(pool: Mapping[str, Contender], losses: Mapping[str, float]) -> list[str]:
    """The exact and the searched plan, where they differ and both are close to the best."""
    limit = RIVAL * min(losses.values())
    close = [key for key in ("exact", "searched") if key in pool and losses[key] <= limit]
    same = len({digest(pool[key].choices) for key in close}) < 2
    return [] if same else close


def _not_worse(engine: Engine, decision: Decision) -> Decision:
    """The decision, or a uniform plan within the target that has a lower true loss.

    The last timing may have tightened the winner so far that it lost its lead.
    """
    within = [c for c in (decision.winner, *decision.baselines.values()) if c.feasible]
    best = min(within, key=lambda c: engine.true_loss(c.name, c.choices), default=decision.winner)
    if best is decision.winner:
        return decision
    return replace(decision, winner=replace(best), met=True, weights={})


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
    return larger if reached and predicted < CLOSE * reached else tuned.choices


def uniform_contenders(engine: Engine, target: float) -> dict[str, Contender]:
    """The best uniform low-rank and the best uniform BLAST plan (b > 1) within the target."""
    blocks = [b for b in engine.space.num_blocks if b > 1]
    makers: dict[str, tuple[str, Make]] = {
        "uniform_low_rank": ("uniform low rank", lambda r: engine.largest_uniform(1, r)),
        "uniform_blast": ("uniform BLAST", lambda r: engine.best_uniform(r, blocks)),
    }
    found = {}
    for key, (name, make) in makers.items():
        contender = meet(engine, name, make, target)
        if contender is None and key == "uniform_blast" and blocks:
            # None is fast enough on this device: the fastest one is shown, over the budget.
            choices = engine.fastest_uniform(blocks)
            contender = meet(engine, name, lambda _, c=choices: c, target) if choices else None  # type: ignore[misc]
        if contender and not contender.all_dense:
            found[key] = contender
            loss = engine.true_loss(name, contender.choices)
            blocks_used = max(c.num_blocks for c in contender.choices.values())
            engine.note_point(f"uniform b{blocks_used}", contender.choices, loss)
    engine.latency.correction = 1.0
    return found


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
    were pessimistic, gets a larger rival; of the two the one of less true loss stays.
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
        decision = Decision(winner, timed, target, timings[0], trials, winner.feasible, make)
        if winner.feasible:
            best = _better(engine, best, decision)
            again = larger(engine, winner, make, target) if round_ < LARGER else None
        elif best:
            break
        else:
            engine.report.detail(
                f"  final timing {winner.ratio:.3f} is over {target:.3f}: tightening"
            )
            aim *= min(0.99, target / winner.ratio)
            again = meet(engine, winner.name, make, target, aim)
        if again is None:
            break
        winner = again
    return best or decision


def _better(engine: Engine, best: Decision | None, other: Decision) -> Decision:
    if best is None:
        return other
    return min(best, other, key=lambda d: engine.true_loss(d.winner.name, d.winner.choices))


def larger(engine: Engine, winner: Contender, make: Make, target: float) -> Contender | None:
    """A plan that uses what the winner leaves of the target, if that is much; not timed yet."""
    if not engine.by_time or winner.all_dense or winner.ratio >= CLOSE * target:
        return None
    asked = engine.latency.asked_correction(winner.choices, winner.ratio)
    engine.latency.correction = bounded(asked)
    choices = make(engine.aim * target)
    if digest(choices) == digest(winner.choices):
        return None
    engine.report.detail(f"  final timing {winner.ratio:.3f} leaves room below {target:.3f}")
    return replace(winner, choices=choices)


def _fastest(engine: Engine, exact: Contender | None, target: float) -> tuple[Contender, Make]:
    """The fastest plan there is, measured: the last resort, and what an infeasible budget gets."""
    choices = engine.fastest()
    (timing,) = engine.time("fastest", {"fastest": choices}, FINAL_SECONDS)
    ratio = engine.measured_ratio(choices, timing)
    fastest = Contender("fastest", choices, timing, ratio, ratio <= target)
    if exact is not None and exact.ratio < ratio:
        fastest = exact
    return fastest, lambda _: fastest.choices


def infeasible(
    scope: str, budget: float, decision: Decision, share: float
) -> InfeasibleBudgetError:
    """The error for a decision that does not meet its budget."""
    reachable = scope_ratio(scope, decision.winner.ratio, decision.dense, share)
    if decision.winner.all_dense:
        reason = "no candidate is faster than dense on this device: keep this model dense"
    elif scope == "model" and decision.target <= 0:
        fixed = decision.dense.fixed_ms / decision.dense.dense_ms
        reason = f"everything outside the searched layers alone takes {fixed:.2f} of dense"
    else:
        reason = "the smallest ranks of the search space still take that much"
    # Rounded up: the budget that is named must be reachable.
    smallest = -(-reachable * 1000 // 1) / 1000
    return InfeasibleBudgetError(
        f"no plan meets budget {budget:g} (scope {scope}): the smallest reachable budget is about "
        f"{smallest:.3f}; {reason}. The nearest plan is in plan.json."
    )
