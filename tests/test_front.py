"""`pareto` on run folders made of plain tables: which plan is picked, and what is said of it."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import call

from blast_search.describe import write_front
from blast_search.errors import IncompatibleInputError, InfeasibleBudgetError
from blast_search.files import read_json_object, sha256_json, write_json, write_rows
from blast_search.latency import fingerprint
from blast_search.plan import FrontPoint, LayerPlan, Plan
from blast_search.replan import check_layers, plan_at
from blast_search.runfolder import FIELDS, RunFolder
from blast_search.space import DENSE, Call, Candidate, LayerSpec, SearchSpace
from blast_search.tables import Cell, LatencyTable, Measurement, Score, ScoreTable, cell_row

SPACE = SearchSpace("some", num_blocks=(1, 2), keep=(0.1, 0.2, 0.3, 0.4, 0.5), rank_multiple=1)
LAYERS = [LayerSpec(f"fc{i}", 64, 64, True, (Call(8),)) for i in range(4)]
ENVIRONMENT = {"device": "some", "threads": 1}
PARAMS, MACS = 100_000, 400_000.0


def cell(candidate: Candidate) -> Cell:
    return Cell(fingerprint(ENVIRONMENT), "eager", "float32", "c", 64, 64, True, 8, candidate)


def timed(ratio: float, half: float = 0.02) -> Measurement:
    low, high = ratio * (1 - half), ratio * (1 + half)
    return Measurement(100 * ratio, 1, 1, 9, 100.0, ratio, low, high)


def measured(ratio: float) -> dict[str, Any]:
    """Layers take 8 of 10 ms."""
    return {
        "dense_latency_ms": 10.0, "fixed_latency_ms": 2.0, "latency_ratio_layers": ratio,
        "latency_ratio_model": (2 + 8 * ratio) / 10, "macs_ratio": 0.6, "params_ratio": 0.7,
        "metric": {"name": "m", "higher_is_better": True, "dense": 1.0, "compressed": 0.9},
        "met_budget": True,
    }  # fmt: skip


def ratio_of(c: Candidate) -> float:
    """Time follows parameters; two blocks are slower."""
    return c.params(64, 64) / 64**2 + 0.02 * c.num_blocks


def write_run(run: Path, space: str) -> Path:
    """A finished run; low rank loses half as much in the first two layers, two blocks do in the
    others, so that the exact plan mixes block counts."""
    run.mkdir()
    table = LatencyTable(fingerprint(ENVIRONMENT), run / "latency.csv")
    table.add(cell(DENSE), timed(1.0))
    scores: dict[str, dict[Candidate, Score]] = {}
    for c in SPACE.candidates(LAYERS[0])[1:]:
        table.add(cell(c), timed(ratio_of(c)))
        for place, layer in enumerate(LAYERS):
            suits = (c.num_blocks == 1) == (place < 2)
            loss = (1 if suits else 2) * (1 - c.params(64, 64) / 64**2)
            scores.setdefault(layer.name, {})[c] = Score(loss, loss)
    write_rows(run / "scores.csv", ScoreTable.FIELDS, ScoreTable(scores).rows())
    write_json(run / "layers.json", {"layers": [asdict(ly) for ly in LAYERS], "skipped": {}})
    write_json(run / "environment.json", ENVIRONMENT)
    (run / "config.yaml").write_text(yaml.safe_dump({"space": space}))
    plan = Plan(
        {"name": "some", "params": PARAMS, "macs": MACS},
        {ly.name: LayerPlan.of(ly, Candidate(2, 9)) for ly in LAYERS},
        budget={"value": 0.5, "scope": "model", "max_drop": None},
        measured=measured(0.4),
    )
    plan.save(run / "plan.json")
    (run / "plans").mkdir()
    low = {ly.name: LayerPlan.of(ly, Candidate(1, 10)) for ly in LAYERS}
    replace(plan, layers=low, measured=measured(0.35)).save(run / "plans/uniform-low-rank.json")
    rows = [("searched", "", 0.4, 0.3, 0.2, 1), ("exact 0.60", 0.6, "", 0.2, 0.1, 1),
            ("uniform b1", "", 0.35, 0.5, 0.4, 0), ("dense", 1.0, "", 0, 0, 1)]  # fmt: skip
    dicts = [dict(zip(FrontPoint.FIELDS, row, strict=True)) for row in rows]
    write_rows(run / "front.csv", FrontPoint.FIELDS, dicts)
    return run


@pytest.fixture
def spaces(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    values = {"num_blocks": [1, 2], "keep": list(SPACE.keep), "rank_multiple": 1}
    Path("any.yaml").write_text(yaml.safe_dump(values))
    Path("uniform.yaml").write_text(yaml.safe_dump(values | {"uniform": True}))
    return tmp_path


def blocks(plan: Plan) -> set[int]:
    return {c.num_blocks for c in plan.choices.values()}


def test_a_run_in_a_uniform_space_gives_uniform_plans(spaces: Path):
    assert blocks(plan_at(write_run(spaces / "a", "any.yaml"), 0.3)) == {1, 2}
    plan = plan_at(write_run(spaces / "u", "uniform.yaml"), 0.3)
    assert len(set(plan.choices.values())) == 1  # four layers of one shape: one rank
    assert plan.predicted["latency_ratio_layers"] <= 0.3
    (choice,) = set(plan.choices.values())
    larger = Candidate(choice.num_blocks, choice.rank + 1)
    assert ratio_of(larger) > 0.3
    with pytest.raises(InfeasibleBudgetError, match="the smallest is"):
        plan_at(spaces / "u", 0.01)


def test_the_space_is_the_one_of_the_run_folder_and_named_where_it_is_gone(spaces: Path):
    run, file = write_run(spaces / "u", "uniform.yaml"), spaces / "uniform.yaml"
    file.rename(run / "space.yaml")
    assert len(blocks(plan_at(run, 0.3))) == 1
    (run / "space.yaml").unlink()
    with pytest.raises(IncompatibleInputError, match=r"uniform\.yaml does not exist"):
        plan_at(run, 0.3)


def test_doubtful_cells_count_as_they_were_measured_again(spaces: Path):
    run = write_run(spaces / "a", "any.yaml")
    before, table = plan_at(run, 0.3), (run / "latency.csv").read_text()
    rows = [
        cell_row(cell(c), timed(0.9, 0.001))
        for c in SPACE.candidates(LAYERS[0])
        if c.num_blocks == 2
    ]
    RunFolder.open(run).once("doubtful cells", "0.3000", "exact", lambda: rows)
    assert 2 in blocks(before)
    assert 2 not in blocks(plan_at(run, 0.3))
    assert (run / "latency.csv").read_text() == table
    assert FIELDS[0] in (run / "measured.csv").read_text()


def test_another_plan_comes_with_four_ratios_and_its_scope(spaces: Path, capsys):
    run = str(write_run(spaces / "a", "any.yaml"))
    assert call("pareto", run, "--at", "0.3", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["budget"] == {"value": 0.3, "scope": "layers", "max_drop": None}
    assert result["run_budget"]["scope"] == "model"
    predicted, plan = result["predicted"], Plan.load(result["plan"])
    ratio = predicted["latency_ratio_layers"]
    assert predicted["latency_ratio_model"] == pytest.approx((2 + 8 * ratio) / 10)
    saved = sum(ly.params(DENSE) - ly.params(plan.choices[ly.name]) for ly in LAYERS)
    assert predicted["params_ratio"] == pytest.approx(1 - saved / PARAMS)
    assert predicted["macs_ratio"] == pytest.approx(1 - 8 * saved / MACS)
    assert call("pareto", run, "--at", "0.3") == 0
    shown = capsys.readouterr().out
    assert "budget 0.3 (scope layers)" in shown
    for key in ("latency_ratio_layers", "latency_ratio_model", "macs_ratio", "params_ratio"):
        assert f"{predicted[key]:.3f}" in shown


def test_the_front_says_its_scope_and_the_ratios_that_are_on_file(spaces: Path, capsys):
    run = str(write_run(spaces / "a", "any.yaml"))
    assert call("pareto", run) == 0
    shown = capsys.readouterr().out
    assert "budget 0.5 (scope model)" in shown
    assert "0.4000 measured" in shown
    assert call("pareto", run, "--csv") == 0
    rows = {r["name"]: r for r in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert {r["budget_scope"] for r in rows.values()} == {"model"}
    ratios = {
        name: [r[key] for key in ("model_latency_ratio", "macs_ratio", "params_ratio")]
        for name, r in rows.items()
    }
    assert ratios == {
        "searched": ["0.52000", "0.60000", "0.70000"],
        "exact 0.60": ["0.68000", "", ""],
        "uniform b1": ["0.48000", "0.60000", "0.70000"],
        "dense": ["1.00000"] * 3,
    }


def test_a_baseline_that_is_another_plan_by_now_lends_its_point_no_ratios(spaces: Path, capsys):
    run = write_run(spaces / "a", "any.yaml")
    path = run / "plans/uniform-low-rank.json"
    replace(Plan.load(path), measured=measured(0.36)).save(path)
    assert call("pareto", str(run), "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["front"]}
    assert rows["uniform b1"]["params_ratio"] is None
    assert rows["uniform b1"]["model_latency_ratio"] == pytest.approx((2 + 8 * 0.35) / 10)
    each = {"latency_ratio_layers_by_workload": {"x": 0.2, "y": 0.35}}
    kept = Plan.load(path)
    budget = kept.budget | {"every_workload": ["x", "y"]}
    replace(kept, measured=kept.measured | each, budget=budget).save(path)
    assert call("pareto", str(run), "--json") == 0  # the point's ratio is that of the worst one
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["front"]}
    assert rows["uniform b1"]["params_ratio"] == 0.7


def test_every_point_of_a_new_front_has_its_sizes(spaces: Path, capsys):
    run = write_run(spaces / "a", "any.yaml")
    points = [FrontPoint("exact 0.60", 0.6, False, 0.2, 0.1, {}, 0.61, 0.71),
              FrontPoint("searched", 0.4, True, 0.3, 0.2, {}, 0.6, 0.7)]  # fmt: skip
    write_front(run, points)
    assert call("pareto", str(run), "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["front"]}
    assert (rows["exact 0.60"]["macs_ratio"], rows["exact 0.60"]["params_ratio"]) == (0.61, 0.71)
    assert call("pareto", str(run), "--csv") == 0
    (row, _) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["params_ratio"] == "0.71000"
    (run / "front.csv").write_text((run / "front.csv").read_text().replace("0.71000", "much"))
    assert call("pareto", str(run)) == 4


def numbers_of(value: Any) -> set[type]:
    return {type(v) for row in value for k, v in row.items() if k not in ("name", "budget_scope")}


def test_the_front_as_json_has_numbers_and_null(spaces: Path, capsys):
    run = str(write_run(spaces / "a", "any.yaml"))
    assert call("pareto", run, "--json") == 0
    front = json.loads(capsys.readouterr().out)["front"]
    assert numbers_of(front) == {float, bool, type(None)}
    rows = {row["name"]: row for row in front}
    assert rows["exact 0.60"]["predicted_layer_latency_ratio"] == 0.6
    assert rows["exact 0.60"]["macs_ratio"] is None
    assert [row["on_front"] for row in front] == [True, True, False, True]


def test_files_go_into_new_folders_and_not_over_folders(spaces: Path, capsys):
    run = write_run(spaces / "a", "any.yaml")
    (run / "front.png").write_bytes(b"picture")
    out, plot = ["--at", "0.3", "--out"], "--plot"
    assert call("pareto", str(run), *out, "new/one/p.json", plot, "new/two/x.png") == 0
    assert Plan.load("new/one/p.json").budget["value"] == 0.3
    assert Path("new/two/x.png").read_bytes() == b"picture"
    assert call("pareto", str(run), plot, "new/x.svg") == 2
    assert "expected a name that ends in .png" in capsys.readouterr().err
    assert call("pareto", str(run), "--out", "p.json") == 2
    assert "is where --at writes its plan" in capsys.readouterr().err
    before = (run / "plan.json").read_bytes()
    for own in ("plan.json", "front.csv", "plans/uniform-low-rank.json"):
        assert call("pareto", str(run), *out, str(run / own)) == 2
        assert "is a file of a run, which --out would change" in capsys.readouterr().err
    assert (run / "plan.json").read_bytes() == before
    for name in ("plans/at-0.3.json", "plans/at-0.3.json", "plans/mine.json"):
        assert call("pareto", str(run), *out, str(run / name)) == 0
    capsys.readouterr()
    for options in ([*out, "new"], [plot, "new"]):
        assert call("pareto", str(run), *options) == 2
        assert "new is a folder, expected a file" in capsys.readouterr().err


@pytest.mark.parametrize("space", ["any.yaml", "uniform.yaml"])
def test_the_nearest_plan_is_written_where_a_ratio_is_out_of_reach(
    space: str, spaces: Path, capsys
):
    run = write_run(spaces / "a", space)
    assert call("pareto", str(run), "--at", "0.001", "--json") == 3
    told = json.loads(capsys.readouterr().out)
    assert told["plan"] == str(run / "plans/at-0.001.json")
    assert "smallest ranks of the search space still take" in told["error"]
    assert told["error"].endswith(f"The nearest plan is in {told['plan']}.")
    smallest = float(told["error"].partition("the smallest is ")[2].partition(":")[0])
    ratio = Plan.load(told["plan"]).predicted["latency_ratio_layers"]
    assert smallest - 1e-3 < ratio <= smallest
    assert call("pareto", str(run), "--at", str(smallest)) == 0
    capsys.readouterr()
    text = (run / "latency.csv").read_text().splitlines()
    (run / "latency.csv").write_text("\n".join(text[:2]) + "\n")  # only dense
    assert call("pareto", str(run), "--at", "0.5", "--out", "new/p.json") == 3
    message = capsys.readouterr().err
    assert "no candidate is faster than dense on this device" in message
    assert "in new/p.json" in message
    assert blocks(Plan.load("new/p.json")) == {0}


DAMAGE = {
    "scores.csv": (lambda text: text.replace(text.split(",")[-1], "nan\n"), "nan is not finite"),
    "front.csv": (lambda text: text.replace("0.6,", "inf,"), "--resume a"),
    "environment.json": (lambda text: "5", "holds int, expected an object"),
    "measured.csv": (
        lambda text: 'kind,digest,plan,value\ndoubtful cells,0.3,exact,"[5]"\n',
        "expected a list of cells",
    ),
}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_file_of_a_run_is_corrupt_input_and_no_plan_is_written(
    file: str, spaces: Path, capsys
):
    run = write_run(spaces / "a", "any.yaml")
    damage, text = DAMAGE[file]
    path = run / file
    path.write_text(damage(path.read_text() if path.exists() else ""))
    assert call("pareto", "a", "--at", "0.3") == 4
    message = capsys.readouterr().err
    assert text in message
    assert file in message
    assert not (run / "plans" / "at-0.3.json").exists()
    if file == "front.csv":
        assert call("pareto", "a") == call("report", "a") == 4
        path.unlink()
        assert call("pareto", "a", "--at", "0.3") == 4
        assert not (run / "plans" / "at-0.3.json").exists()


@pytest.mark.parametrize(("field", "value"), [("task", 5), ("environment", []), ("model", "x")])
def test_a_plan_of_other_types_is_refused_by_name(field: str, value: Any, spaces: Path):
    plan = Plan.load(write_run(spaces / "a", "any.yaml")).to_json() | {field: value}
    del plan["sha256"]
    with pytest.raises(IncompatibleInputError, match=f"plan: {field} is .* expected"):
        Plan.from_json(plan | {"sha256": sha256_json(plan)})


def test_a_run_is_not_continued_with_other_layers(spaces: Path):
    run = write_run(spaces / "a", "any.yaml")
    check_layers(run, LAYERS, "some data")  # a run of before data were on file
    with pytest.raises(IncompatibleInputError, match=rf"\({LAYERS[-1].name} differs\)"):
        check_layers(run, LAYERS[:-1], "some data")
    known = read_json_object(run / "layers.json")
    write_json(run / "layers.json", known | {"calibration": "some data"})
    check_layers(run, LAYERS, "some data")
    with pytest.raises(IncompatibleInputError, match=r"other calibration data .* now other data"):
        check_layers(run, LAYERS, "other data")
    (run / "layers.json").unlink()  # stopped before it had any
    check_layers(run, LAYERS[:-1], "other data")
