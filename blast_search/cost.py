"""Measured time as money."""

from __future__ import annotations

from blast_search.document import (
    Block,
    Paragraph,
    Table,
    clean,
    interval_of,
    number,
    pick,
    show,
    show_range,
)
from blast_search.plan import Plan


def blocks(plan: Plan, price: float) -> list[Block]:
    """Cost of a million calls before and after, of the search, and when it has paid.

    `price` is per hour of the measured device, in any currency.
    """
    dense = number(pick(plan.measured, "dense_latency_ms"))
    now = number(pick(plan.measured, "latency_ms", "median"))
    stages = pick(plan.search, "seconds") or {}
    spent = [(clean(k), s) for k, v in stages.items() if (s := number(v)) is not None]
    total = sum(seconds for stage, seconds in spent if stage != "total")
    rows = [
        [name, show(ms), show(ms and ms / 3.6 * price, ",.2f"), show(ms and 3.6e6 / ms, ",.0f")]
        for name, ms in (("dense model", dense), ("searched plan", now))
    ]
    head = ["measured", "ms per call", "cost per million calls", "calls per hour"]
    found: list[Block] = [
        Paragraph(
            f"At {price:g} per hour of this device, in any currency. One call is one pass over "
            "the workload named under Environment."
        ),
        Table(head, rows, strong=1),
    ]
    if spent:
        parts = ", ".join(f"{k} {s:,.0f} s" for k, s in spent if k != "total")
        found.append(
            Paragraph(
                f"Search and retraining took {total:,.0f} s ({parts}) and cost "
                f"{total / 3600 * price:,.2f}."
            )
        )
    found.append(Paragraph(_break_even(plan, dense, now, total if spent else None)))
    return found


def _break_even(plan: Plan, dense: float | None, now: float | None, total: float | None) -> str:
    if dense is None or now is None:
        return "Nothing was timed, so there is no statement about savings."
    interval = interval_of(pick(plan.measured, "latency_ratio_model_ci95"))
    if now >= dense:
        return "There is no break-even: a call of this plan is not faster than the dense model."
    if interval and interval[1] >= 1:
        return (
            f"There is no reliable break-even: the 95% interval of the model latency ratio, "
            f"{show_range(interval)}, includes 1."
        )
    saved = f"A call saves {dense - now:.3f} ms ({(1 - now / dense) * 100:.1f}%)."
    if total is None:
        return saved
    calls = f"{_round(total * 1000 / (dense - now))} calls"
    if interval:
        few, many = (_round(total * 1000 / (dense * (1 - end))) for end in interval)
        calls += f" (95% interval {few} to {many})"
    return f"{saved} Search and retraining have paid for themselves after {calls}, at any price."


def _round(value: float) -> str:
    """A count to three digits."""
    digits = 3 - len(str(int(value)))
    return f"{round(value, min(digits, 0)):,.0f}"
