"""How far predictions can be trusted: latency, additivity of scores, what the trials brought."""

from __future__ import annotations

from collections.abc import Sequence

from blast_search.document import Block, Paragraph, Table, clean, number, pick, show
from blast_search.figures import FrontRow
from blast_search.plan import CHOSEN, Plan
from blast_search.plan_check import CHECKED, check_text


def blocks(plan: Plan, front: Sequence[FrontRow]) -> list[Block]:
    named = {row.name: row for row in front}
    chosen = named.get(CHOSEN, named.get("searched"))
    pairs = [
        ("layer latency ratio", pick(plan.predicted, "latency_ratio_layers"),
         pick(plan.measured, "latency_ratio_layers")),
        ("latency of a call, ms", pick(plan.predicted, "latency_ms"),
         pick(plan.measured, "latency_ms", "median")),
        ("added loss before retraining", pick(plan.predicted, "score_increase"),
         chosen.loss if chosen else None),
    ]  # fmt: skip
    rows = []
    for name, predicted, measured in pairs:
        a, b = number(predicted), number(measured)
        off = "-" if a is None or not b else f"{(a / b - 1) * 100:+.1f}%"
        rows.append([name, show(a, ".4g"), show(b, ".4g"), off])
    found: list[Block] = [Table(["this plan", "predicted", "measured", "prediction off by"], rows)]
    said = (
        _latency_check(plan), _latency_error(plan), _noise(plan), _additivity(plan),
        _probing(plan), _trials(plan),
    )  # fmt: skip
    found += [Paragraph(text) for text in said if text]
    rounds = pick(plan.search, "rounds")
    steps = [
        [
            clean(pick(r, "plan") or "-"),
            show(pick(r, "predicted_ratio")),
            show(pick(r, "measured_ratio")),
        ]
        for r in (rounds if isinstance(rounds, list) else [])
    ]
    if steps:
        text = (
            "Plans of each kind were built, timed and chosen anew until their measured latency "
            "fitted:"
        )
        head = ["plan", "predicted layer ratio", "measured layer ratio"]
        found += [Paragraph(text), Table(head, steps)]
    gap = number(pick(plan.search, "optimality_gap"))
    if gap is not None:
        text = f"Within the table the exact plan is at most {gap * 100:.2g}% from the optimum"
        solver = clean(pick(plan.search, "solver") or "")
        found.append(Paragraph(text + (f" (solver: {solver})." if solver else ".")))
    return found


def _latency_check(plan: Plan) -> str:
    found = plan.search.get("latency_check")
    if isinstance(found, dict) and all(number(pick(found, key)) is not None for key in CHECKED):
        return check_text(found)
    return "No random plans were timed, so the error of predicted latency is not known."


def _latency_error(plan: Plan) -> str:
    found = pick(plan.search, "latency_error")
    median, worst = number(pick(found, "median")), number(pick(found, "worst"))
    if median is None or worst is None:
        return ""
    return (
        f"In the {show(pick(found, 'plans'), '.0f')} rounds of the closed loop, predicted layer "
        f"latency differed from measured by {median * 100:.1f}% (median), {worst * 100:.1f}% "
        "(worst)."
    )


def _noise(plan: Plan) -> str:
    return clean(pick(plan.search, "timing_noise", "text") or "")


def _additivity(plan: Plan) -> str:
    found = pick(plan.search, "additivity")
    rank = number(pick(found, "rank_correlation"))
    if rank is None:
        return "Additivity was not checked: whether layer scores add up to the loss is not known."
    text = (
        f"Additivity: on {show(pick(found, 'plans'), '.0f')} random plans near the budget, the "
        "sum of predicted layer scores ranks the measured loss with a rank correlation of "
        f"{rank:.2f} (1 is perfect) and a slope of {show(pick(found, 'slope'), '.2f')} (1 means "
        "that scores simply add up)."
    )
    fitted = number(pick(found, "fitted_rank_correlation"))
    if fitted is None:
        return text
    text += f" Factors fitted to these plans reach {fitted:.2f} on plans held out of the fit"
    if pick(found, "fallback"):
        return f"{text}: additivity is poor, so that they took the place of the plain scores."
    if pick(found, "poor"):
        return (
            f"{text}. Additivity is poor and they do not clearly help: only plans whose true loss "
            "was measured are to be trusted."
        )
    return text + "."


def _probing(plan: Plan) -> str:
    found = pick(plan.search, "probing")
    layers, probed = number(pick(found, "layers")), number(pick(found, "probed"))
    if layers is None or probed is None or probed >= layers:
        return ""
    return (
        f"The time limit left room to probe {probed:.0f} of {layers:.0f} layers; the others were "
        "given what lies between the probed layers of their type."
    )


def _trials(plan: Plan) -> str:
    found = pick(plan.search, "optuna")
    overhead = number(pick(found, "overhead_ms"))
    if pick(found, "trials") is None:
        return ""
    text = (
        f"Optuna: {show(pick(found, 'trials'), '.0f')} trials, of which "
        f"{show(pick(found, 'moves'), '.0f')} moved single layers and "
        f"{show(pick(found, 'pruned'), '.0f')} were given up early. Loss at one predicted "
        f"latency: exact plan {show(pick(found, 'exact_loss'), '.4g')}, best by weights "
        f"{show(pick(found, 'weights_loss'), '.4g')}, by steps along the gradient "
        f"{show(pick(found, 'steps_loss'), '.4g')}, by moves "
        f"{show(pick(found, 'moves_loss'), '.4g')} (measured)."
    )
    return text + ("" if overhead is None else f" Overhead per trial: {overhead:.0f} ms.")
