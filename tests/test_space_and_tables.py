"""Search spaces, tables and plans as files: what is refused, and that whole files survive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blast_search.errors import FallbackWarning, IncompatibleInputError, RunLockedError, UsageError
from blast_search.files import append_row, locked, read_json, read_rows, write_json
from blast_search.plan import FrontPoint, LayerPlan, Plan, pareto
from blast_search.replan import read_layers
from blast_search.space import DENSE, Call, Candidate, LayerSpec, SearchSpace, load_space
from blast_search.tables import Cell, LatencyTable, Measurement

LAYER = LayerSpec("a.0.fc", 48, 96, True, (Call(16),))


def test_shipped_spaces_load():
    assert load_space("default") == SearchSpace()
    assert load_space("paper").uniform
    assert len(load_space("quick").keep) < len(load_space("default").keep)
    with pytest.raises(UsageError, match="default, paper, quick"):
        load_space("nonsense")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_blocks: [1, 2", "not valid YAML"),
        ("num_block: [1]", "unknown key 'num_block', expected include"),
        ("num_blocks: [0]", "num_blocks is \\[0\\], expected a list of whole numbers"),
        ("num_blocks: 4", "expected a list"),
        ("keep: [0.5, 1.5]", "between 0 and 1"),
        ("uniform: 3", "true or false"),
        ("ties: 3", "list of name patterns"),
        ("rank_multiple: 0", "at least 1"),
        ("- a\n- b", "expected `key: value`"),
    ],
)
def test_bad_space_files(tmp_path: Path, text: str, message: str):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(IncompatibleInputError, match=message):
        load_space(path)


def test_candidates_follow_the_rules():
    candidates = SearchSpace(num_blocks=(1, 2, 5, 32)).candidates(LAYER)
    assert candidates[0] == DENSE
    assert {c.num_blocks for c in candidates} == {0, 1, 2}  # 5 and 32 do not divide 48 and 96
    assert all(LAYER.params(c) < 48 * 96 for c in candidates[1:])
    only_blocks = SearchSpace(num_blocks=(4,)).candidates(LAYER)
    assert {c.num_blocks for c in only_blocks} == {0, 1, 4}  # low rank is always a candidate
    prime = LayerSpec("p", 61, 53, False, (Call(1),))
    assert {c.num_blocks for c in SearchSpace().candidates(prime)} == {0, 1}
    tiny = LayerSpec("t", 4, 4, False, (Call(1),))
    assert all(c.rank >= 1 for c in SearchSpace().candidates(tiny)[1:])


def test_impossible_block_counts():
    with pytest.raises(IncompatibleInputError, match=r"\[7\].*divides none of the 1 layers"):
        SearchSpace(num_blocks=(7,), uniform=True).check([LAYER])
    with pytest.warns(FallbackWarning, match=r"\[7\].*divides none.*only low rank \(b = 1\)"):
        SearchSpace(num_blocks=(7,)).check([LAYER])
    SearchSpace(num_blocks=(1, 7)).check([LAYER])


def test_candidate_keys():
    for c in (DENSE, Candidate(4, 128)):
        assert Candidate.from_key(c.key) == c
    for key in ("", "b0r3", "b4", "b4r0", "b04r2", "dense2", "b4r1.5"):
        with pytest.raises(IncompatibleInputError):
            Candidate.from_key(key)


def cell(rank: int = 8, **changes) -> Cell:
    values = {
        "device": "d1", "mode": "eager", "dtype": "float32", "kernel": "lowrank",
        "out_features": 96, "in_features": 48, "bias": True, "tokens": 16,
        "candidate": Candidate(1, rank),
    }  # fmt: skip
    return Cell(**(values | changes))


MEASURED = Measurement(50.0, 48.0, 55.0, 20, 100.0, 0.5, 0.49, 0.51, 0.02)


def test_latency_table_round_trip(tmp_path: Path):
    path = tmp_path / "latency.csv"
    table = LatencyTable.open(path, "d1")
    table.add(cell(), MEASURED)
    table.add(cell(16), None, "failed: out of memory")
    again = LatencyTable.open(path, "d1")
    assert again.cells == table.cells
    assert again.costs(LAYER) == {DENSE: 100.0, Candidate(1, 8): 50.0}


def test_a_torn_row_is_dropped_and_not_glued(tmp_path: Path):
    path = tmp_path / "latency.csv"
    table = LatencyTable.open(path, "d1")
    table.add(cell(8), MEASURED)
    table.add(cell(16), MEASURED)
    path.write_bytes(path.read_bytes()[:-20])
    torn = LatencyTable.open(path, "d1")
    assert set(torn.cells) == {cell(8)}
    torn.add(cell(24), MEASURED)
    assert set(LatencyTable.open(path, "d1").cells) == {cell(8), cell(24)}


def test_foreign_and_damaged_tables_are_refused(tmp_path: Path):
    path = tmp_path / "latency.csv"
    LatencyTable.open(path, "d1").add(cell(), MEASURED)
    with pytest.raises(IncompatibleInputError, match="measured on device d1, this is d2"):
        LatencyTable.open(path, "d2")
    LatencyTable.open(path, "d1", cell().mode)
    with pytest.raises(IncompatibleInputError, match=r"in mode .*, this is eager-cold"):
        LatencyTable.open(path, "d1", "eager-cold")
    good = path.read_text()
    path.write_text(good + '"' + good * 2000)  # a stray quote, and more than a field can hold
    with pytest.raises(IncompatibleInputError, match=r"field larger than .* Restore the file"):
        LatencyTable.open(path, "d1")
    damaged = (good.replace(",0.5,", ",x,"), good.replace(",0.5,", ",-1,"))
    for bad in (*damaged, "a,b\n1,2\n"):
        path.write_text(bad)
        with pytest.raises(IncompatibleInputError, match=r"latency\.csv") as error:
            LatencyTable.open(path, "d1")
        assert ("Remove the damaged line" in str(error.value)) == (bad in damaged)


def test_shared_layers_cost_every_call():
    layer = LayerSpec("s", 48, 96, True, (Call(16), Call(16), Call(4, 0.5)))
    table = LatencyTable("d1")
    table.add(cell(), MEASURED)
    assert table.costs(layer) == {}  # the 4-token call was never measured
    table.add(cell(tokens=4), Measurement(20, 20, 20, 9, 40.0, 0.5, 0.5, 0.5))
    assert table.costs(layer)[DENSE] == 100 + 100 + 20


def plan() -> Plan:
    layers = {"a": LayerPlan("blast", 4, 8, 48, 96), "b": LayerPlan("dense", 0, 0, 48, 96)}
    return Plan(model={"name": "Net"}, layers=layers, budget={"value": 0.3})


def test_plan_round_trip(tmp_path: Path):
    plan().save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan()
    assert Plan.load(tmp_path) == plan()
    assert plan().choices == {"a": Candidate(4, 8), "b": DENSE}


def test_every_truncation_and_edit_of_a_plan_is_refused(tmp_path: Path):
    path = tmp_path / "plan.json"
    plan().save(path)
    data = path.read_bytes()
    for cut in range(0, len(data) - 2, 7):
        path.write_bytes(data[:cut])
        with pytest.raises(IncompatibleInputError):
            Plan.load(path)
    for place in range(0, len(data) - 2, 5):
        flipped = bytearray(data)
        flipped[place] ^= 1
        path.write_bytes(bytes(flipped))
        try:
            loaded = Plan.load(path)
        except IncompatibleInputError:
            continue
        assert loaded == plan()  # a flipped space means nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version 2"),
        (
            {"layers": {"a": {"kind": "blast"}}},
            "layer a is .* expected exactly kind, .* search",
        ),
        ({"extra": 1}, r"missing or unknown fields \['extra'\], expected .* or search again"),
    ],
)
def test_plans_of_other_shapes_are_refused(change, message):
    value = plan().to_json() | change
    value.pop("sha256")
    from blast_search.files import sha256_json

    with pytest.raises(IncompatibleInputError, match=message):
        Plan.from_json(value | {"sha256": sha256_json(value)})


def test_what_is_no_plan_is_told_what_one_is():
    for value in ([], {"budget": 0.3}):
        with pytest.raises(IncompatibleInputError, match=r"no schema_version\. Expected .* Check"):
            Plan.from_json(value)


@pytest.mark.parametrize("value", [[], {"skipped": {}}, {"layers": [{"name": "a"}]}])
def test_a_damaged_inventory_says_what_to_do(value: object, tmp_path: Path):
    write_json(tmp_path / "layers.json", value)
    with pytest.raises(IncompatibleInputError, match=r"layers\.json is damaged .* Restore"):
        read_layers(tmp_path)


def test_impossible_layer_plan_is_refused():
    from dataclasses import replace

    bad = replace(plan(), layers={"a": LayerPlan("blast", 5, 8, 48, 96)})
    with pytest.raises(IncompatibleInputError, match="layer a"):
        Plan.from_json(bad.to_json())


def test_json_is_strict(tmp_path: Path):
    path = tmp_path / "x.json"
    for text in ('{"a": NaN}', '{"a": 1, "a": 2}', "{", "\x80"):
        path.write_bytes(text.encode("latin1"))
        with pytest.raises(IncompatibleInputError, match=r"x\.json"):
            read_json(path)
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert path.read_bytes() == b"\x80"  # the failed write left the old file


def test_rows_with_too_few_columns(tmp_path: Path):
    path = tmp_path / "t.csv"
    append_row(path, ("a", "b"), {"a": 1, "b": 2})
    with path.open("a") as stream:
        stream.write("3\n")
    with pytest.raises(IncompatibleInputError, match="line 3"):
        read_rows(path, ("a", "b"))


def test_lock_is_exclusive(tmp_path: Path):
    with locked(tmp_path), pytest.raises(RunLockedError, match="in use"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_pareto_keeps_only_undominated_points():
    def point(name: str, ratio: float, loss: float) -> FrontPoint:
        return FrontPoint(name, ratio, False, 0.0, loss, {})

    points = [point("a", 0.3, 2), point("b", 0.4, 2.5), point("c", 0.5, 1), point("twin", 0.3, 2)]
    assert [p.name for p in pareto(points)] == ["a", "c"]


def test_plan_json_is_plain(tmp_path: Path):
    plan().save(tmp_path / "p.json")
    value = json.loads((tmp_path / "p.json").read_text())
    assert value["schema_version"] == 1
    assert value["layers"]["a"]["num_blocks"] == 4
