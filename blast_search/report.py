"""report.html, report.md and front.png: what a run found, and what that is worth.

Everything comes from the files of the run folder; nothing is measured here.  A run that was cut
off gives a report too, with "-" where a value is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.table
from rich.box import SIMPLE_HEAD
from rich.text import Text

from blast_search import cost, explain
from blast_search.document import (
    Block,
    Notice,
    Paragraph,
    Picture,
    Section,
    Table,
    clean,
    interval_of,
    number,
    pick,
    show,
    show_range,
    to_html,
    to_markdown,
)
from blast_search.errors import IncompatibleInputError, UsageError
from blast_search.figures import FrontRow, front_png, read_front
from blast_search.files import is_run, read_yaml_mapping, write_bytes, write_text
from blast_search.plan import Plan

SCOPES = {
    "layers": ("The searched layers together take", "latency", "latency_ratio_layers"),
    "model": ("The whole model takes", "latency", "latency_ratio_model"),
    "macs": ("The whole model takes", "multiply-adds", "macs_ratio"),
    "params": ("The whole model has", "parameters", "params_ratio"),
}
RATIOS = {
    "layer_latency_ratio": "latency_ratio_layers",
    "model_latency_ratio": "latency_ratio_model",
    "macs_ratio": "macs_ratio",
    "params_ratio": "params_ratio",
}


def result_rows(plan: Plan) -> list[dict[str, Any]]:
    """The result in numbers: dense, the two uniform baselines, the plan; all of it measured.

    Each row has plan, description, metric_before and metric_after (retraining),
    layer_latency_ratio, model_latency_ratio (and their _ci95), macs_ratio, params_ratio.
    None stands for what was not measured.
    """
    dense = pick(plan.baselines, "dense") or dict.fromkeys(RATIOS.values(), 1.0)
    rows = [
        _row("dense", dense, "dense"),
        _row("best uniform BLAST", pick(plan.baselines, "uniform_blast")),
        _row("best uniform low rank", pick(plan.baselines, "uniform_low_rank")),
        _row("searched plan", plan.measured),
    ]
    if rows[0]["metric_before"] is None:
        rows[0]["metric_before"] = number(pick(plan.measured, "metric", "dense"))
    return rows


def _row(label: str, values: Any, metric: str = "compressed") -> dict[str, Any]:
    row: dict[str, Any] = {
        "plan": label,
        "description": clean(pick(values, "description") or ""),
        "metric_before": number(pick(values, "metric", metric)),
        "metric_after": number(pick(values, "metric", "retrained")),
    }
    for name, key in RATIOS.items():
        row[name] = number(pick(values, key))
        if "latency" in name:
            row[f"{name}_ci95"] = interval_of(pick(values, f"{key}_ci95"))
    return row


def _head(plan: Plan) -> list[str]:
    metric = clean(pick(plan.measured, "metric", "name") or "metric")
    return [
        "plan", f"{metric} before retraining", f"{metric} after retraining",
        "layer latency ratio", "model latency ratio", "MACs ratio", "parameter ratio",
    ]  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    metrics = [show(row[key], ".4g") for key in ("metric_before", "metric_after")]
    return metrics + [show(row[name]) for name in RATIOS]


def result_table(plan: Plan) -> rich.table.Table:
    """`result_rows` for the terminal."""
    table = rich.table.Table(
        caption=Text(_direction(plan), style="dim"),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, title in enumerate(_head(plan)):
        table.add_column(
            Text(title),
            justify="right" if index else "left",
            vertical="bottom",
            max_width=10 if index else 27,
            overflow="fold",
        )
    for row in result_rows(plan):
        label = Text(row["plan"])
        if row["description"]:
            label.append(f"\n{row['description']}", style="dim")
        style = "bold" if row["plan"].startswith("searched") else None
        table.add_row(label, *(Text(cell) for cell in _cells(row)), style=style)
    return table


def _direction(plan: Plan) -> str:
    higher = pick(plan.measured, "metric", "higher_is_better")
    better = {True: "Higher is better", False: "Lower is better"}.get(higher)
    metric = clean(pick(plan.measured, "metric", "name") or "the metric")
    text = f"{better} for {metric}. " if better else ""
    return (
        f"{text}Metric and latency are measured, MACs and parameters counted; "
        "ratios are to dense. '-': not measured."
    )


def write_report(run: Path, price_per_hour: float = 1.0) -> None:
    """Write front.png, report.md and report.html into a run folder.

    Args:
        price_per_hour: of this device, in any currency.

    Raises:
        UsageError: a price that is negative or not a number.
        IncompatibleInputError: no plan.json, or a damaged file.
    """
    if not (0 <= price_per_hour < math.inf):
        raise UsageError(
            f"the price per hour is {price_per_hour}, expected a number >= 0, for instance 1.5."
        )
    if not (run / "plan.json").is_file():
        raise unfinished(run, "plan.json")
    plan, front = Plan.load(run / "plan.json"), read_front(run / "front.csv")
    line, label = _budget_line(plan)
    png = front_png(front, line, label)
    if png:
        write_bytes(run / "front.png", png)
    name = clean(pick(plan.model, "name") or "unnamed model")
    title = f"BLAST search: {name}"
    sections = [
        Section("", [verdict(plan), *_remarks(plan)]),
        Section("Result", _result(plan)),
        Section("Front", _picture(png, front, plan)),
        Section("What it is worth", cost.blocks(plan, price_per_hour)),
        *explain.sections(run, plan, front),
    ]
    write_text(run / "report.md", to_markdown(title, sections))
    write_text(run / "report.html", to_html(title, sections))


def unfinished(run: Path, file: str) -> IncompatibleInputError:
    """The error of a folder without a file that every finished search leaves, by what it is."""
    text = f"{run} holds no {file}, expected a run folder with a finished search."
    if is_comparison(run):
        text = f"{run} is the folder of a comparison, which has no {file}, expected a search's."
        if (run / "compare.md").is_file():
            return IncompatibleInputError(f"{text} Read {run / 'compare.md'}.")
        text += " It is not finished, either."
    if is_run(run):
        return IncompatibleInputError(f"{text} Continue it with `{resuming(run)}`.")
    if (run / "latency.csv").is_file():
        text = f"{run} is a latency table (`blast-search profile`), expected a finished search."
        return IncompatibleInputError(
            f"{text} `blast-search search --out {run}` begins one with the table's cells; give it "
            "a budget, and the task and space of the table."
        )
    return IncompatibleInputError(f"{text} Check the path.")


def is_comparison(run: Path) -> bool:
    """Whether the run in a folder was started by `compare`: it keeps how often to retrain."""
    try:
        return is_run(run) and "seeds" in read_yaml_mapping(run / "config.yaml")
    except IncompatibleInputError:
        return False


def resuming(run: Path) -> str:
    """The command that continues the run in a folder."""
    return f"blast-search {'compare' if is_comparison(run) else 'search'} --resume {run}"


def verdict(plan: Plan) -> Notice:
    """Whether the budget was met and by how much, or that the model should stay dense."""
    ratio = number(pick(plan.measured, "latency_ratio_model"))
    if plan.layers and all(layer.kind == "dense" for layer in plan.layers.values()):
        text = f"The plan changes no layer; {budget_text(plan.budget)}."
        return Notice("Keep this model dense.", text, "plain")
    scope = pick(plan.budget, "scope") or "layers"
    subject, what, key = SCOPES.get(scope, SCOPES["layers"])
    value, limit = number(pick(plan.measured, key)), number(pick(plan.budget, "value"))
    if value is None or ratio is None:
        predicted = show(pick(plan.predicted, "latency_ratio_layers"))
        text = (
            f"The run stopped before the plan was built and timed. Predicted layer latency ratio: "
            f"{predicted}; budget {show(limit, 'g')} (scope {scope})."
        )
        return Notice("Not measured.", text, "plain")
    if ratio >= 1 and what == "latency":
        text = (
            f"The plan's model takes {ratio:.3f} of the dense latency: nothing was gained; "
            f"{budget_text(plan.budget)}."
        )
        return Notice("Keep this model dense.", text, "bad")
    each = pick(plan.measured, "latency_ratio_layers_by_workload")
    if pick(plan.budget, "every_workload") and isinstance(each, dict):
        known = {name: r for name, v in each.items() if (r := number(v)) is not None}
        worst = max(known, key=known.__getitem__, default="")
        subject = f"On the workload {clean(worst)}, the slowest, the searched layers together take"
        value, key = known.get(worst, value), ""  # the interval on file is that of the sum
    parts = [f"{subject} {value:.3f} of the dense {what} (scope {scope}"]
    if limit is None:
        parts = [f"{parts[0]}); no latency budget was set"]
    else:
        parts = [f"{parts[0]}); the budget is {limit:g}, so this is {_distance(value - limit)}"]
        interval = interval_of(pick(plan.measured, f"{key}_ci95"))
        if interval and interval[0] <= limit <= interval[1]:
            parts.append(f"the budget lies inside the 95% interval, {show_range(interval)}")
    if what != "latency" and ratio >= 1:
        parts.append(f"its latency is {ratio:.3f} of the dense one: it is no faster")
    drop, allowed = _drop(plan), number(pick(plan.budget, "max_drop"))
    if allowed is not None:
        parts.append(f"{_change(plan, drop)} (allowed {allowed:g})")
    met = pick(plan.measured, "met_budget")
    heading, tone = {
        True: ("Budget met.", "good"), False: ("Budget missed.", "bad"),
    }.get(met, ("Budget not judged.", "plain"))  # fmt: skip
    return Notice(heading, "; ".join(parts) + ".", tone)


def budget_text(budget: Mapping[str, Any]) -> str:
    """A plan's budget in words, with its scope: "budget 0.3 (scope layers)"."""
    limit, drop = number(pick(budget, "value")), number(pick(budget, "max_drop"))
    text = "no latency budget" if limit is None else f"budget {limit:g}"
    text += f" (scope {clean(pick(budget, 'scope') or 'layers')})"
    text += " on each workload" if pick(budget, "every_workload") else ""
    return text if drop is None else f"{text}, largest drop {drop:g}"


def _change(plan: Plan, drop: float | None) -> str:
    metric = pick(plan.measured, "metric")
    name = clean(pick(metric, "name") or "the metric")
    if drop is None:
        return f"how far {name} moved is not known"
    if drop <= 0:
        return f"{name} is not worse than dense"
    return f"{name} {'falls' if pick(metric, 'higher_is_better') else 'rises'} by {drop:.4g}"


def _distance(excess: float) -> str:
    side = "above" if excess > 0 else "below"
    return "exactly on it" if abs(excess) < 5e-5 else f"{abs(excess):.4f} {side} it"


def _drop(plan: Plan) -> float | None:
    """By how much the final model is worse than dense, in the metric's unit."""
    metric = pick(plan.measured, "metric")
    after = number(pick(metric, "retrained"))
    final = number(pick(metric, "compressed")) if after is None else after
    dense, higher = number(pick(metric, "dense")), pick(metric, "higher_is_better")
    if final is None or dense is None or higher is None:
        return None
    return dense - final if higher else final - dense


def _remarks(plan: Plan) -> list[Block]:
    task = f"Task: {clean(plan.task)}." if plan.task else ""
    texts = (clean(pick(plan.search, "verdict") or ""), task)
    return [Paragraph(text) for text in texts if text]


def _result(plan: Plan) -> list[Block]:
    rows = result_rows(plan)
    words = [r["plan"] + (f" ({r['description']})" if r["description"] else "") for r in rows]
    cells = [[word, *_cells(row)] for word, row in zip(words, rows, strict=True)]
    table = Table(_head(plan), cells, strong=len(rows) - 1, stacked=True)
    intervals = [
        f"{row['plan']}: layers {show_range(row['layer_latency_ratio_ci95'])}"
        + (f", model {show_range(model)}" if (model := row["model_latency_ratio_ci95"]) else "")
        for row in rows
        if row["layer_latency_ratio_ci95"]
    ]
    blocks: list[Block] = [table, Paragraph(_direction(plan))]
    if intervals:
        blocks.append(Paragraph(f"95% intervals of the latency ratios: {'; '.join(intervals)}."))
    return blocks


def _budget_line(plan: Plan) -> tuple[float | None, str]:
    """Where the budget lies on the axis of layer latency ratios, if it has a place there."""
    limit, scope = number(pick(plan.budget, "value")), pick(plan.budget, "scope")
    dense = number(pick(plan.measured, "dense_latency_ms"))
    fixed = number(pick(plan.measured, "fixed_latency_ms"))
    if limit is not None and scope == "layers":
        return limit, f"budget {limit:g}"
    if limit is not None and scope == "model" and dense and fixed is not None and fixed < dense:
        return (limit * dense - fixed) / (dense - fixed), f"budget {limit:g} of the model"
    return None, ""


def _picture(png: bytes | None, front: list[FrontRow], plan: Plan) -> list[Block]:
    if png is None:
        why = "no plan's loss was measured" if front else "there is no front.csv"
        return [Paragraph(f"No picture: {why}.")]
    text = (
        "Each mark is a whole plan that was built, with its measured loss on calibration data. "
        "Filled marks: the latency ratio was measured. Hollow marks: it was predicted from the "
        "layers' measured latencies."
    )
    left_out = sum(row.loss is None or row.ratio is None for row in front)
    if left_out:
        text += f" Not drawn, as only predicted: {left_out} of {len(front)} plans in front.csv."
    if _budget_line(plan)[0] is None and pick(plan.budget, "value") is not None:
        text += " The budget has no place on this axis and is not drawn."
    description = "Measured loss against layer latency ratio of all evaluated plans"
    return [Picture(png, "front.png", description), Paragraph(text)]
