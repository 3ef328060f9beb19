"""The verb `pareto`: the front of a run, and plans for other budgets from what is on file."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from blast_search.document import number, pick, show
from blast_search.errors import InfeasibleBudgetError, UsageError
from blast_search.figures import read_front
from blast_search.files import is_run, make_folder, read_rows, write_bytes
from blast_search.modelfolder import OF_A_RUN
from blast_search.plan import CHOSEN, FrontPoint, Plan
from blast_search.progress import console
from blast_search.replan import model_ratio, plan_at
from blast_search.report import RATIOS, budget_text, unfinished, write_report

_, PREDICTED, MEASURED, _, _, _ = FrontPoint.FIELDS
COLUMNS = (*FrontPoint.FIELDS, *FrontPoint.SIZES, "model_latency_ratio", "budget_scope")
SHOWN = ("model_latency_ratio", *FrontPoint.SIZES)


def existing_run(run: Path) -> Path:
    if not run.is_dir():
        raise UsageError(f"{run} is no run folder. Check the path (results/<run>).")
    return run


def pareto(
    run: Path, at: float | None, out: Path | None, plot: Path | None, form: str
) -> dict[str, Any]:
    """The front of a run; with `at`, a plan for another budget from the tables on file.

    Raises:
        UsageError, IncompatibleInputError: no run, a file name that will not do, a damaged file.
        InfeasibleBudgetError: no plan is predicted to be within `at`; the fastest one is written.
    """
    existing_run(run)
    for option, file in (("--out", out), ("--plot", plot)):
        if file and file.is_dir():
            raise UsageError(f"{option} {file} is a folder, expected a file. Add a name to it.")
    if plot and plot.suffix.lower() != ".png":
        raise UsageError(f"--plot {plot} is to be a PNG, expected a name that ends in .png.")
    if out and at is None:
        raise UsageError(f"--out {out} is where --at writes its plan: give --at, a layer budget.")
    if at is not None and not 0 < at <= 1:
        raise UsageError(f"--at is {at:g}, expected a ratio above 0 and up to 1.")
    if not (run / "front.csv").is_file():
        raise unfinished(run, "front.csv")
    base = Plan.load(run / "plan.json")
    rows = front_rows(run, base)
    result: dict[str, Any] = {}
    if at is not None:
        path = out or run / "plans" / f"at-{at:g}.json"
        plan = _written(run, at, path)
        result |= {"plan": str(path), "budget": plan.budget, "predicted": plan.predicted}
        if form == "table":
            _print_plan(plan)
            console().print(
                f"{path}: not measured yet, `blast-search apply` and `verify` it.", markup=False
            )
    if plot:
        if not (run / "front.png").is_file():
            write_report(run)
        make_folder(plot.parent)
        write_bytes(plot, (run / "front.png").read_bytes())
    if form == "csv":
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif form == "table" and at is None:
        _print_front(rows, base)
    return {"run_budget": base.budget} | result | {"front": [_numbers(row) for row in rows]}


def _written(run: Path, at: float, path: Path) -> Plan:
    """The plan for another budget, in a file; where there is none, the nearest one is in it.

    Raises:
        UsageError: the file is one that a run has written.
    """
    here = path.resolve()
    ours = is_run(here.parent) or (here.parent.name in OF_A_RUN and is_run(here.parent.parent))
    if ours and here.exists() and not here.name.startswith("at-"):
        raise UsageError(f"{path} is a file of a run, which --out would change. Choose another.")
    try:
        plan, missed = plan_at(run, at), None
    except InfeasibleBudgetError as error:
        plan = error.nearest
        missed = InfeasibleBudgetError(f"{error} The nearest plan is in {path}.")
        missed.result = {"plan": str(path)}
    make_folder(path.parent)
    plan.save(path)
    if missed:
        raise missed
    return plan


def _numbers(row: Mapping[str, str]) -> dict[str, Any]:
    """A row as JSON values: text stays text, what is not known is null."""
    texts = ("name", "budget_scope")
    values = {k: v if k in texts else float(v) if v else None for k, v in row.items()}
    return values | {"on_front": row["on_front"] == "1"}


def front_rows(run: Path, base: Plan) -> list[dict[str, str]]:
    """front.csv, with what its plans are for the whole model, as far as that is on file.

    The latency of the whole model is the measured one, else that of the layers' ratio; an older
    file has no multiply-adds and parameters ("").
    """
    read_front(run / "front.csv")  # refuses what is no number
    rows = read_rows(run / "front.csv", FrontPoint.FIELDS, FrontPoint.SIZES)
    known = _measured(run, base, {row["name"]: row for row in rows})
    every = bool(base.budget.get("every_workload"))  # ratios are then those of the worst one
    for row in rows:
        values = known.get(row["name"], {})
        ratio = number(values.get(RATIOS["model_latency_ratio"]))
        if ratio is None and not every:
            ratio = model_ratio(base, _layer_ratio(row))
        row |= {"model_latency_ratio": _text(ratio), "budget_scope": _scope(base)}
        for key in FrontPoint.SIZES:
            row[key] = row[key] or _text(number(values.get(key)))
    return rows


def _measured(
    run: Path, base: Plan, rows: Mapping[str, Mapping[str, str]]
) -> dict[str, Mapping[str, Any]]:
    """What was measured of the plans of a front, by name."""
    known: dict[str, Mapping[str, Any]] = {"dense": dict.fromkeys(RATIOS.values(), 1.0)}
    for stem in ("searched", "uniform-low-rank", "uniform-blast"):
        path = run / "plans" / f"{stem}.json"
        if path.is_file():
            plan = Plan.load(path)
            blocks = max((c.num_blocks for c in plan.choices.values()), default=0)
            name = "searched" if stem == "searched" else f"uniform b{blocks}"
            if name == "searched" or _same(rows.get(name), plan):
                known[name] = plan.measured
    return known | {CHOSEN if CHOSEN in rows else "searched": base.measured}


def _same(row: Mapping[str, str] | None, plan: Plan) -> bool:
    """Whether a point of the front is the plan of its name.

    The last timing may have made that one smaller or larger since the point was evaluated, and
    then the point has no measured ratio.
    """
    each = pick(plan.measured, "latency_ratio_layers_by_workload") or {}
    worst = max((v for v in map(number, each.values()) if v is not None), default=None)
    ratio = worst if plan.budget.get("every_workload") else None
    ratio = number(pick(plan.measured, "latency_ratio_layers")) if ratio is None else ratio
    if not row or not row[MEASURED] or ratio is None:
        return False
    return f"{float(row[MEASURED]):.5f}" == f"{ratio:.5f}"


def _layer_ratio(row: Mapping[str, str]) -> float | None:
    text = row[PREDICTED] or row[MEASURED]
    return float(text) if text else None


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _scope(plan: Plan) -> str:
    return str(pick(plan.budget, "scope") or "layers")


def _print_front(rows: list[dict[str, str]], base: Plan) -> None:
    view = _table(f"evaluated plans (* on the front); {budget_text(base.budget)}")
    for column in ("loss, predicted", "loss, measured"):
        view.add_column(column, justify="right")
    for row in sorted(rows, key=lambda row: _layer_ratio(row) or 0.0):
        how = "measured" if row[MEASURED] else "predicted"
        view.add_row(
            Text(row["name"] + (" *" if row["on_front"] == "1" else "")),
            f"{_layer_ratio(row) or 0.0:.4f} {how}",
            *(f"{float(row[key]):.3f}" if row[key] else "-" for key in SHOWN),
            *(f"{float(row[key]):.4g}" if row[key] else "-"
              for key in ("predicted_loss_increase", "measured_loss")),
        )  # fmt: skip
    console().print(view)


def _print_plan(plan: Plan) -> None:
    view = _table(f"predicted ratios to dense; {budget_text(plan.budget)}")
    view.add_row("new plan", *(show(plan.predicted[key]) for key in RATIOS.values()))
    console().print(view)


def _table(title: str) -> Table:
    """Room for a plan's name and its four ratios to dense."""
    view = Table(title=Text(title))
    for column in ("plan", "layer latency", "model latency", "MACs", "parameters"):
        view.add_column(column, justify="left" if column == "plan" else "right")
    return view
