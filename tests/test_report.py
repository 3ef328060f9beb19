"""The report of synthetic run folders: whole, cut off, hostile and damaged."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from blast_search.errors import IncompatibleInputError, UsageError
from blast_search.figures import front_png, kind_of, read_front
from blast_search.files import write_json, write_rows
from blast_search.plan import FrontPoint, LayerPlan, Plan
from blast_search.report import result_rows, result_table, verdict, write_report
from blast_search.space import DENSE, Candidate
from blast_search.tables import FIELDS, Cell, Measurement, cell_row

TYPES = {"attention.query": (384, 384), "attention.output": (384, 384),
         "intermediate": (1536, 384), "output": (384, 1536)}  # fmt: skip
NASTY = "encoder.<script>alert('x')</script>|`a`*b*"


def measured(layers: float, model: float, before: float, after: float | None) -> dict[str, Any]:
    return {
        "dense_latency_ms": 9.84, "fixed_latency_ms": 2.11, "macs_ratio": 0.312,
        "latency_ms": {"median": 9.84 * model, "p10": 9.7 * model, "p90": 10.1 * model,
                       "ci95": [9.8 * model, 9.9 * model], "runs": 60},
        "latency_ratio_layers": layers,
        "latency_ratio_layers_ci95": [layers - 0.006, layers + 0.007],
        "latency_ratio_model": model,
        "latency_ratio_model_ci95": [model - 0.004, model + 0.005],
        "params_ratio": 0.588, "met_budget": True,
        "metric": {"name": "recall@1", "higher_is_better": True, "dense": 0.8425,
                   "compressed": before, "retrained": after},
    }  # fmt: skip


def whole_plan(extra: dict[str, LayerPlan] | None = None) -> Plan:
    layers = {}
    for block in range(6):
        for index, (kind, (m, n)) in enumerate(TYPES.items()):
            name = f"encoder.layer.{block}.{kind}"
            choice = [Candidate(2, 56), DENSE, Candidate(4, 88), Candidate(1, 72 + 16 * block)]
            picked = choice[index] if block else DENSE
            kind_name = "dense" if picked.is_dense else "blast"
            layers[name] = LayerPlan(kind_name, picked.num_blocks, picked.rank, n, m)
    dense = {
        "description": "the model as given",
        "latency_ratio_layers": 1.0,
        "latency_ratio_model": 1.0,
        "macs_ratio": 1.0,
        "params_ratio": 1.0,
        "metric": {"name": "recall@1", "higher_is_better": True, "dense": 0.8425},
    }
    return Plan(
        model={"name": "MiniLM-L6", "fingerprint": "ab12", "params": 22_713_216, "macs": 5.6e9},
        layers=layers | (extra or {}),
        task="minilm",
        workload=[{"name": "default", "weight": 1.0, "shape": [8, 128]}],
        environment={"device": "AMD EPYC 9B14", "device_type": "cpu", "capability": "avx512",
                     "threads": 2, "torch": "2.13.0+cpu", "cuda": None, "python": "3.11.2",
                     "system": "Linux 6.1", "dtype": "float32", "date": "2026-01-02"},
        budget={"value": 0.3, "scope": "layers", "max_drop": 0.02},
        predicted={"latency_ms": 4.38, "latency_ratio_layers": 0.2941, "score_increase": 0.0317},
        measured=measured(0.2978, 0.4484, 0.8012, 0.8321),
        baselines={
            "dense": dense,
            "uniform_blast": measured(0.2993, 0.4496, 0.7530, 0.8106)
            | {"description": "b = 2, keep 0.20 in every layer"},
            "uniform_low_rank": measured(0.2951, 0.4463, 0.7311, None)
            | {"description": "keep 0.25 in every layer"},
        },
        search={
            "optimality_gap": 0.0004, "solver": "scipy milp", "trials": 24, "seed": 0,
            "seconds": {"profile": 212.4, "score": 143.1, "search": 390.0, "retrain": 618.2},
            "peak_memory_mb": 1830,
            "additivity": {"plans": 50, "batches": 2, "rank_correlation": 0.64, "slope": 1.21,
                           "fitted_rank_correlation": 0.94, "poor": True, "fallback": True},
            "probing": {"layers": 24, "probed": 12},
            "optuna": {"trials": 24, "pruned": 3, "steps": 9, "moves": 6, "workers": 1,
                       "exact_loss": 0.0352, "weights_loss": 0.0315, "steps_loss": 0.0313,
                       "moves_loss": 0.031, "best_loss": 0.031, "lowered_loss_by": 0.119,
                       "overhead_ms": 38.2},
            "latency_error": {"plans": 8, "median": 0.021, "worst": 0.064, "bias": 0.011},
            "price": {"loss_per_percent": 0.00082,
                      "layers": [{"name": "encoder.layer.3.intermediate", "from": "b4r88",
                                  "to": "b4r72", "tied": 0, "cost_percent": -1.1, "loss": 0.0009}],
                      "looser": [{"name": "encoder.layer.2.output", "from": "b1r104",
                                  "to": "b1r112", "tied": 0, "cost_percent": 1.3,
                                  "loss": -0.0007}]},
            "rounds": [{"predicted_ratio": 0.2999, "measured_ratio": 0.3121},
                       {"predicted_ratio": 0.2941, "measured_ratio": 0.2978}],
            "verdict": "The plan beats the best uniform BLAST plan by 0.0215 recall@1.",
        },
        created="2026-01-02T03:04:05Z",
    )  # fmt: skip


def front_rows() -> list[dict[str, Any]]:
    def row(name: str, predicted: float, real: float | None, loss: float | None, on: int) -> Any:
        values = (name, predicted, "" if real is None else real, loss and loss * 0.9,
                  "" if loss is None else loss, on)  # fmt: skip
        return dict(zip(FrontPoint.FIELDS, values, strict=True))

    rows = [row("dense", 1.0, 1.0, 0.0, 1), row("searched", 0.2941, 0.2978, 0.031, 1)]
    for ratio in (0.2, 0.25, 0.3, 0.4, 0.5, 0.65):
        rows.append(row(f"uniform b2 keep {ratio}", ratio, None, 0.012 / ratio**1.5, 0))
        rows.append(row(f"uniform b1 keep {ratio}", ratio * 0.97, None, 0.016 / ratio**1.5, 0))
        rows.append(row(f"exact {ratio}", ratio, ratio + 0.004, 0.0068 / ratio**1.4, 1))
    for n in range(20):
        rows.append(row(f"trial {n}", 0.292 + n % 5 * 0.002, None, 0.033 + n * 0.0011, 0))
    rows.append(row("exact 0.1", 0.1, None, None, 0))
    return rows


def write_run(run: Path, plan: Plan, front: bool = True) -> Path:
    run.mkdir(exist_ok=True)
    plan.save(run / "plan.json")
    calls = [{"tokens": 1024, "weight": 1.0}]
    layers = [
        {"name": name, "in_features": p.in_features, "out_features": p.out_features, "bias": True,
         "calls": calls, "aliases": []}
        for name, p in plan.layers.items()
    ]  # fmt: skip
    skipped = {"pooler.dense": "is not called by the workload", NASTY: "is <b>tied</b>"}
    write_json(run / "layers.json", {"layers": layers, "skipped": skipped})
    cells = []
    for m, n in sorted(set(TYPES.values())):
        for b, ratio in ((1, 1.09 if m == n else 0.62), (4, 1.07 if m == n else 0.55)):
            cell = Cell("cpu-1", "eager", "float32", "c", m, n, True, 1024, Candidate(b, 64))
            value = Measurement(
                500 * ratio, 480 * ratio, 530 * ratio, 30, 500.0, ratio, ratio, ratio
            )
            cells.append(cell_row(cell, value))
    write_rows(run / "latency.csv", FIELDS, cells)
    if front:
        write_rows(run / "front.csv", FrontPoint.FIELDS, front_rows())
    return run


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.text = list[str](), list[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def report(run: Path, price: float = 1.0) -> tuple[Page, str]:
    write_report(run, price)
    return Page((run / "report.html").read_text()), (run / "report.md").read_text()


def test_whole_run(tmp_path: Path) -> None:
    page, markdown = report(write_run(tmp_path, whole_plan()), price=2.5)
    for words in (
        "Budget met.", "take 0.298 of the dense latency (scope layers); the budget is 0.3, so",
        "0.0022 below it", "recall@1 falls by 0.0104 (allowed 0.02)", "rank correlation of 0.64",
            "reach 0.94 on plans held out of the fit: additivity is poor", "to probe 12 of 24",
            "exact plan 0.0352, best by weights 0.0315, by steps", "+1.30",
            "0.00082 of added loss for each percent",
        "not searched: is not called by the workload", "AMD EPYC 9B14", "8 x 128",
    ):  # fmt: skip
        assert words in page.text
        assert words in markdown
    assert "1.07 of dense (measured)" in page.text
    assert "faster candidates exist (down to 0.55 of dense, measured)" in page.text
    assert [link[:22] for link in page.links] == ["data:image/png;base64,"]
    assert "script" not in page.tags
    assert "![" in markdown
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    plan = whole_plan({NASTY: LayerPlan("blast", 2, 8, 64, 64)})
    plan = replace(plan, model={"name": "<img src=x onerror=alert(1)>"}, task="<b>x</b>",
                   environment={"device": "<i>gpu</i>", "<u>": "\x1b[31m"},
                   search={"verdict": "<h1>big</h1>"})  # fmt: skip
    page, markdown = report(write_run(tmp_path, plan))
    assert not {"script", "i", "u"} & set(page.tags)
    assert (page.tags.count("img"), page.tags.count("h1")) == (1, 1)
    assert NASTY in page.text
    assert "\x1b" not in page.text + markdown
    code = "``encoder.<script>alert('x')</script>\\|`a`*b*``"  # the table's bar is escaped
    assert markdown.count(code) == markdown.count("alert('x')") > 1
    assert not any(tag in markdown for tag in ("<h1>", "<img", "<i>"))


def test_money_and_break_even(tmp_path: Path) -> None:
    page, _ = report(write_run(tmp_path, whole_plan()), price=2.0)
    assert f"{9.84 / 3.6 * 2:,.2f}" in page.text  # cost of a million calls of the dense model
    total, saved = 212.4 + 143.1 + 390.0 + 618.2, 9.84 * (1 - 0.4484) / 1000
    assert f"{round(total / saved, -3):,.0f} calls" in page.text
    assert f"cost {total / 3600 * 2:,.2f}." in page.text


@pytest.mark.parametrize(("model", "words"), [
    (1.01, "There is no break-even: a call of this plan is not faster"),
    (0.998, "There is no reliable break-even"),
])  # fmt: skip
def test_no_break_even(tmp_path: Path, model: float, words: str) -> None:
    plan = replace(whole_plan(), measured=measured(1.0, model, 0.8, None))
    page, _ = report(write_run(tmp_path, plan))
    assert words in page.text
    assert "paid for themselves" not in page.text


def test_verdicts() -> None:
    plan = whole_plan()
    missed = replace(plan, measured=measured(0.31, 0.45, 0.8, 0.81) | {"met_budget": False})
    assert verdict(missed).title == "Budget missed."
    assert "0.0100 above it" in verdict(missed).text
    assert "falls by 0.0325 (allowed 0.02)" in verdict(missed).text
    close = replace(plan, measured=measured(0.302, 0.45, 0.8, 0.83))
    assert "inside the 95% interval, 0.296 to 0.309" in verdict(close).text
    drop = replace(plan, budget={"value": None, "scope": "layers", "max_drop": 0.02})
    assert "no latency budget was set" in verdict(drop).text
    params = replace(plan, budget={"value": 0.6, "scope": "params", "max_drop": None})
    assert "The whole model has 0.588 of the dense parameters (scope p" in verdict(params).text
    slower = replace(params, measured=measured(1.1, 1.05, 0.8, None))
    assert verdict(slower).title == "Budget met."
    assert "its latency is 1.050 of the dense one: it is no faster" in verdict(slower).text
    each = {"value": 0.3, "scope": "layers", "every_workload": ["long", "short"]}
    worst = {"latency_ratio_layers_by_workload": {"long": 0.2, "short": 0.352, "idle": None}}
    missed = replace(plan, budget=each, measured=plan.measured | worst | {"met_budget": False})
    assert verdict(missed).title == "Budget missed."
    assert "On the workload short, the slowest, the searched layers together take 0.352" in (
        verdict(missed).text
    )
    assert "0.0520 above it" in verdict(missed).text
    assert "interval" not in verdict(missed).text
    slow = replace(plan, measured=measured(1.1, 1.05, 0.8, None))
    assert verdict(slow).title == "Keep this model dense."
    assert "budget 0.3 (scope layers)" in verdict(slow).text
    dense = replace(plan, layers={"a": LayerPlan("dense", 0, 0, 8, 8)})
    assert verdict(dense).title == "Keep this model dense."
    assert "budget 0.3 (scope layers), largest drop 0.02" in verdict(dense).text
    values = measured(0.29, 0.44, 21.0, 19.5)
    values["metric"] = {"name": "perplexity", "higher_is_better": False, "dense": 18.0,
                        "compressed": 21.0, "retrained": 19.5}  # fmt: skip
    plan = replace(whole_plan(), measured=values, budget={"value": 0.3, "max_drop": 1.0})
    assert "perplexity rises by 1.5 (allowed 1)" in verdict(plan).text


def test_a_run_that_was_cut_off_still_reports(tmp_path: Path) -> None:
    Plan(model={}, layers={}).save(tmp_path / "plan.json")
    page, markdown = report(tmp_path)
    assert "Not measured." in page.text
    assert "stopped before the plan was built" in markdown
    assert "there is no front.csv" in page.text
    assert not (tmp_path / "front.png").exists()
    assert not any(word in page.text + markdown for word in ("None", "nan"))


@pytest.mark.parametrize("gone", ["measured", "baselines", "search", "predicted", "environment",
                                  "budget"])  # fmt: skip
def test_any_part_may_be_missing(tmp_path: Path, gone: str) -> None:
    lost: dict[str, Any] = {gone: {}}
    page, _ = report(write_run(tmp_path, replace(whole_plan(), **lost), front=False))
    assert "None" not in page.text
    result_table(Plan.load(tmp_path))


def test_result_rows_hold_numbers_and_none() -> None:
    dense, blast, low, own = result_rows(whole_plan())
    assert (dense["metric_before"], dense["layer_latency_ratio"]) == (0.8425, 1.0)
    assert blast["metric_after"] == 0.8106
    assert low["metric_after"] is None
    assert own["layer_latency_ratio_ci95"] == pytest.approx((0.2918, 0.3048))
    assert own["description"] == ""
    lost = result_rows(replace(whole_plan(), baselines={}))
    assert (lost[0]["metric_before"], lost[1]["layer_latency_ratio"]) == (0.8425, None)


def test_terminal_table_fits_100_columns() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(result_table(whole_plan()))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert all(word in text for word in ("best uniform low rank", "0.8321", "0.298", "b = 2"))


def test_missing_plan_and_bad_price(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleInputError, match=r"holds no plan\.json"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="expected a number >= 0"):
        write_report(tmp_path, price_per_hour=float("nan"))


@pytest.mark.parametrize(("file", "text"), [
    ("layers.json", "[1]"), ("layers.json", '{"layers": [{"name": "a"}]}'), ("layers.json", "{"),
    ("front.csv", ",".join(FrontPoint.FIELDS) + "\na,b,c,d,e,1\n"), ("front.csv", "x,y\n1,2\n"),
])  # fmt: skip
def test_damaged_files_are_named(tmp_path: Path, file: str, text: str) -> None:
    (write_run(tmp_path, whole_plan()) / file).write_text(text)
    with pytest.raises(IncompatibleInputError, match=file):
        write_report(tmp_path)


def test_kinds_and_pictures(tmp_path: Path) -> None:
    names = ["dense", "uniform b2 keep 0.3", "uniform b1 keep 0.3", "exact 0.30", "trial 7",
             "searched", "chosen", "new kind", ""]  # fmt: skip
    kinds = ["dense", "uniform", "low rank", "exact", "trial", "searched", "chosen", "trial",
             "trial"]  # fmt: skip
    assert [kind_of(name) for name in names] == kinds
    write_rows(tmp_path / "f.csv", FrontPoint.FIELDS, front_rows())
    rows = read_front(tmp_path / "f.csv")
    assert front_png(rows[:1]) is not None  # dense alone, loss 0
    assert front_png([replace(row, loss=None) for row in rows]) is None
    assert front_png(rows) == front_png(rows)
    # The star is the searched plan's, unless another one was chosen.
    named = [replace(row, name="chosen") if row.name == "searched" else row for row in rows]
    assert front_png(named) == front_png(rows)
    assert front_png([*rows, replace(rows[0], name="chosen")]) != front_png(rows)


def test_importing_the_report_does_not_import_matplotlib() -> None:
    code = "import sys, blast_search.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("best", "said"),
    [(1.0, "did not pay"), (0.97, "3.0% against the exact plan"), (0.9, "10.0% against")],
)
def test_what_the_trials_brought_is_said_plainly(best: float, said: str):
    from types import SimpleNamespace

    from blast_search.describe import Describer

    tuning = {
        "trials": 20, "exact_loss": 1.0, "best_loss": best, "lowered_loss_by": 1 - best,
        "weights_loss": 1.0, "steps_loss": best, "moves_loss": 0.99,
    }  # fmt: skip
    describer = Describer(None, SimpleNamespace(tuning=tuning), 0, 0.0)  # type: ignore[arg-type]
    text = describer.trials_paid()
    assert said in text
    assert ("That is little: --trials 0" in text) == (0.95 < best < 1)
    assert ("a step along the gradient" in text) == (best < 1)
