"""compare: every kind of plan in one table, at equal measured latency, and nothing hidden."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import call
from toy import Shallow

from blast_search import closed_loop, contenders, decision, trials
from blast_search.compare import compare, missed
from blast_search.comparison import FIELDS, Comparison, Interval, Row
from blast_search.contenders import climb
from blast_search.engine import Contender
from blast_search.errors import FallbackWarning, IncompatibleInputError, UsageError
from blast_search.model_latency import Timing
from blast_search.progress import SILENT
from blast_search.space import DENSE, Call, Candidate, LayerSpec, SearchSpace

SPACE = SearchSpace(name="default", num_blocks=(1, 2), keep=(0.1, 0.3, 0.6))
OPTIONS = {"space": SPACE, "workers": "local", "trials": 1, "retrain_steps": 2, "seeds": 2}
KINDS = [
    "dense", "uniform low rank", "block-diagonal", "Monarch", "uniform BLAST", "exact plan",
    "full search",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch):
    """Real timings, of the least number of rounds."""
    for module in (closed_loop, contenders):
        monkeypatch.setattr(module, "TIMING_SECONDS", 0.1)
    for module in (decision, contenders):
        monkeypatch.setattr(module, "FINAL_SECONDS", 0.1)
    monkeypatch.setattr(trials, "FRONT_BUDGETS", (0.5,))


def count_evaluations(monkeypatch) -> list[str]:
    calls: list[str] = []
    real = Shallow.evaluate
    monkeypatch.setattr(
        Shallow, "evaluate", lambda self, model: calls.append("evaluate") or real(self, model)
    )
    return calls


def test_one_table_and_resume_repeats_nothing(tmp_path: Path, monkeypatch):
    calls = count_evaluations(monkeypatch)
    out = tmp_path / "c"
    seen: list[int] = []

    def extra(engine, target, evaluations):
        seen.append(evaluations)
        ladder = contenders.uniform_ladder(engine, 2)
        return {"mine": contenders.best_of(engine, "mine", [ladder], target)}

    options = OPTIONS | {"extra": extra, "out": out}
    result = compare(Shallow(), 0.9, **options)
    assert [row.name for row in result.rows] == [*KINDS, "mine"]
    assert seen == [result.facts["loss_evaluations_of_the_search"]]
    said = result.facts["trials"]
    assert said.startswith("The Optuna stage" if result.facts["optuna"] else "")
    assert said in (out / "compare.md").read_text()
    for row in result.rows[1:]:
        assert len(row.after) == 2
        assert row.within == (row.layer_ratio <= 0.9)
        assert 0 < row.macs_ratio <= 1
    sizes = {row.name: row.params_ratio for row in result.rows}
    assert sizes["block-diagonal"] < 0.6  # b >= 2, and a small head that stays dense
    assert len(result.verdicts) >= 5
    rows = list(csv.DictReader((out / "compare.csv").open()))
    assert tuple(rows[0]) == FIELDS
    assert [row["contender"] for row in rows] == [*KINDS, "mine"]
    assert all(name in (out / "compare.md").read_text() for name in KINDS)
    stored = json.loads((out / "compare.json").read_text())
    assert stored["seeds"] == 2
    plans = {json.dumps(row.choices) for row in result.rows[1:]}
    # Equal plans share what is measured; a retraining that did harm is done, and judged, twice.
    assert len(calls) <= 1 + len(plans) * (1 + 2 * 2)
    before, done = (out / "measured.csv").read_text(), len(calls)
    again = compare(Shallow(), 0.9, resume=True, **options)
    assert again.rows == result.rows
    assert len(calls) == done
    assert (out / "measured.csv").read_text() == before
    # A kill in the last stage: only the lost retraining is repeated.
    kept = before.splitlines()
    (out / "measured.csv").write_text("\n".join(kept[:-1]) + "\n")
    third = compare(Shallow(), 0.9, resume=True, **options)
    assert third.rows == result.rows
    assert done < len(calls) <= done + 2
    assert len(set(seen)) == 1  # counted once, not again from what later stages left on file


def test_structures_out_of_reach_are_shown_over_the_budget(tmp_path: Path):
    """At a budget far below what any kind reaches, the fastest ones are shown and marked."""
    result = compare(Shallow(), 0.001, out=tmp_path / "c", **OPTIONS | {"retrain_steps": 0})
    assert [row.name for row in result.rows] == KINDS
    assert not any(row.within for row in result.rows[1:])
    assert result.missed.startswith("no plan of the search meets budget 0.001 (scope layers)")
    assert result.missed[1:] in (tmp_path / "c" / "compare.md").read_text()
    text = (tmp_path / "c" / "compare.md").read_text()
    assert text.count("(over)") == 1 + len(KINDS[1:])
    assert all("no comparison at equal latency" in v for v in result.verdicts)
    assert "No retraining." in text


@pytest.mark.parametrize("real", [0.8, 1.3])
def test_a_contender_that_leaves_room_gets_a_larger_plan_if_that_holds(real: float):
    """Side by side, plans take 0.8 of what single timings said; above size 0.6, `real` of it."""
    engine, ladder = fake_engine(None, [k / 100 for k in range(90, 0, -2)])
    sizes: list[float] = []

    def time(name, plans, seconds):
        (size,) = (choices["a"].size for choices in plans.values())
        sizes.append(size)
        return [SimpleNamespace(ratio_layers=size * (0.8 if size <= 0.6 else real))]

    engine.time = time
    start = Contender("x", next(p for p in ladder if p["a"].size <= 0.6), None, 0.6, True)
    entry = contenders.Entry(start, larger=lambda c: contenders.higher(engine, c, ladder, 0.6))
    level = contenders.level(engine, {"x": entry}, 0.6)["x"]
    assert sizes == ([0.6, 0.72] if real == 0.8 else [0.6, 0.72, 0.6])
    assert level.choices["a"].size == sizes[-1]
    assert level.feasible
    assert level.ratio == pytest.approx(0.8 * sizes[-1])


def fake_engine(latency, sizes):
    """An engine whose clock is a function of a plan's size."""
    layer = SimpleNamespace(name="a", params=lambda c: 1.0 if c.is_dense else c.size)

    def time(name, plans, seconds):
        fake.timed.append(name)
        (choices,) = plans.values()
        return [SimpleNamespace(ratio_layers=latency(choices["a"].size))]

    fake = SimpleNamespace(
        layers=[layer], timed=[], time=time,
        measured_ratio=lambda choices, timing: timing.ratio_layers,
        report=SILENT,
    )  # fmt: skip
    ladder = [{"a": SimpleNamespace(size=s, is_dense=False)} for s in sizes]
    return fake, ladder


@pytest.mark.parametrize("overhead", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("count", [1, 2, 5, 80])
def test_climbing_finds_the_largest_plan_within_the_target(overhead, count):
    sizes = [1 - (i + 1) / (count + 1) for i in range(count)]
    latency = lambda size: overhead + 1.2 * size  # noqa: E731
    fake, ladder = fake_engine(latency, sizes)
    found = climb(fake, "x", ladder, 0.5)
    within = [s for s in sizes if latency(s) <= 0.975 * 0.5]
    size = found.choices["a"].size
    if within:
        assert found.feasible
        assert latency(size) >= 0.94 * 0.975 * 0.5 or size == within[0]
    else:
        assert size == sizes[-1]
        assert found.feasible == (latency(size) <= 0.5)
    assert len(fake.timed) <= contenders.CLIMB_ROUNDS


def test_small_plans_of_a_ladder_are_near_each_other():
    layer = LayerSpec("a", 4096, 4096, True, (Call(1),))
    space = SearchSpace(rank_multiple=1)
    engine = SimpleNamespace(
        layers=[layer], space=space,
        uniform=lambda b, keep: {"a": space.uniform_choice(layer, b, keep)},
    )  # fmt: skip
    sizes = [layer.params(plan["a"]) for plan in contenders.uniform_ladder(engine, 2)]
    assert sizes == sorted(sizes, reverse=True)
    steps = [a / b for a, b in pairwise(sizes)]
    assert max(steps) < 1.1
    kept = [s / 4096**2 for s in sizes]
    assert kept[0] == pytest.approx(0.82, abs=0.01)
    assert kept[-1] == pytest.approx(0.01, abs=0.001)


def timing(ratio: float) -> Timing:
    pair = (ratio, ratio)
    return Timing(1, 1, 1, 9, (1, 1), 1, 0.1, ratio, pair, ratio, pair)


def comparison(higher: bool, search: Row, *others: Row) -> Comparison:
    facts = {"seeds": 3, "retrain_steps": 1, "budget": 0.5}
    return Comparison(Path(), "m", higher, facts, [*others, search])


def test_kinds_without_a_plan_are_named_with_the_reason(tmp_path: Path):
    """128 and 256 are no multiples of 7; low rank and two blocks on the diagonal there are."""
    options = OPTIONS | {"retrain_steps": 0, "space": SearchSpace(num_blocks=(7,), keep=(0.3,))}
    with pytest.warns(FallbackWarning, match="only low rank"):
        result = compare(Shallow(), 0.9, out=tmp_path / "c", **options)
    absent = {"Monarch", "uniform BLAST"}
    assert [row.name for row in result.rows] == [kind for kind in KINDS if kind not in absent]
    assert set(result.to_json()["without_plans"]) == absent
    text = (tmp_path / "c" / "compare.md").read_text()
    assert "Not in the table: Monarch, no block count of the search space (7) divides" in text
    assert "Budget (scope layers)" in text


def test_a_budget_that_the_search_misses_is_exit_three_after_the_table(monkeypatch, capsys):
    plan = {"a": Candidate(1, 8)}
    searched = Contender("exact", plan, timing(0.61234), 0.61234, False)
    decided = SimpleNamespace(met=False)
    text = missed(Path("c"), 0.5, decided, searched)
    assert "meets budget 0.5 (scope layers): the smallest reachable budget is about 0.613" in text
    assert text.endswith("The table is in c/compare.md.")
    dense = replace(searched, choices={"a": DENSE})
    assert "keep this model dense" in missed(Path("c"), 0.5, decided, dense)
    assert missed(Path("c"), 0.5, SimpleNamespace(met=True), searched) == ""
    found = comparison(True, row("full search", (0.5,), 0.6))
    found.facts["missed"] = text
    monkeypatch.setattr("blast_search.compare.compare", lambda **_: found)
    for form in ([], ["--json"]):
        assert call("compare", "--budget", "0.5", "-q", *form) == 3
        shown = capsys.readouterr()
        assert shown.err.strip() == f"error: {text}"
        assert "full search" in shown.out
    told = json.loads(shown.out)
    assert told["exit_code"] == 3
    assert [r["name"] for r in told["rows"]] == ["full search"]


def row(name: str, after: tuple[float, ...], ratio: float = 0.5, **choices: str) -> Row:
    return Row(name, "", ratio <= 0.5, 0.1, after, timing(ratio), choices=choices or {"a": name})


def test_wins_ties_and_losses_are_called_by_name():
    search = row("full search", (0.50, 0.51, 0.52))
    others = [
        row("uniform low rank", (0.40, 0.42, 0.41)),
        row("Monarch", (0.60, 0.61, 0.625)),
        row("uniform BLAST", (0.50, 0.52, 0.50)),
        row("block-diagonal", (0.9, 0.9, 0.9), 0.6),
        row("exact plan", (0.5, 0.5, 0.5), a="full search"),
    ]
    words = ["a win", "a loss", "a tie", "over the budget", "the same plan"]
    for text, other, word in zip(
        comparison(True, search, *others).verdicts, others, words, strict=False
    ):
        assert text.startswith(other.name)
        assert word in text
    flipped = comparison(False, search, *others).verdicts
    assert "a loss" in flipped[0]
    assert "a win" in flipped[1]
    assert "a win, although it is over the budget (layer latency 0.600" in flipped[3]
    one = comparison(True, row("full search", (0.5,)), row("Monarch", (0.6,)))
    assert one.verdicts == ["Monarch: a loss, m 0.1 worse; no interval from one value."]
    better = comparison(True, search, row("uniform BLAST", (0.7, 0.7, 0.7)))
    assert "would keep the uniform BLAST plan" in better.verdicts[-1]


def test_lower_is_better_is_compared_by_factors():
    """One wild value of a rival that is always worse makes no tie."""
    search = row("full search", (400.0, 380.0, 390.0))
    wild = row("block-diagonal", (3e5, 5e5, 2.4e6))
    (text,) = comparison(False, search, wild).verdicts
    assert text.startswith("block-diagonal: a win, m 0.0005481 times the other's (95% interval ")
    low, high = (float(w) for w in re.findall(r"interval (\S+) to (\S+) over 3 seeds", text)[0])
    assert low < 0.0005481 < high < 0.01
    signed = comparison(False, row("full search", (0.0,)), row("Monarch", (0.5,)))  # no factors
    assert signed.verdicts == ["Monarch: a win, m 0.5 better; no interval from one value."]


def test_interval_of_students_t():
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.ci95 == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)  # 4.3027 / sqrt 3
    assert Interval.of([5.0]).ci95 is None


def test_the_verb(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text("num_blocks: [1, 2]\nkeep: [0.1, 0.4]\n")
    base = ["compare", "--task", "toy:shallow", "--workers", "local", "--space", "s.yaml"]
    assert call(*base) == 2
    assert "give --budget" in capsys.readouterr().err
    assert call(*base, "--budget", "0.5", "--seeds", "0") == 2
    assert call(*base, "--resume", "nowhere") == 2
    assert not Path("results").exists()
    few = ["--budget", "0.9", "--trials", "0", "--retrain-steps", "0", "--out", "c"]
    capsys.readouterr()
    assert call(*base, *few, "--json", "-q") == 0
    value = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in value["rows"]] == KINDS
    assert call("compare", "--resume", "c", "--budget", "0.5", "-q") == 2
    assert "budget cannot change" in capsys.readouterr().err
    assert call("--resume", "c", "-q") == 4  # a comparison is no search
    assert call("compare", "--resume", "c") == 0
    shown = capsys.readouterr().out
    assert "The search against uniform low rank" in shown
    assert "Monarch" in shown


def test_refusals(tmp_path: Path):
    with pytest.raises(UsageError, match="seeds is 0"):
        compare(Shallow(), 0.5, 0, out=tmp_path / "x")
    with pytest.raises(UsageError, match="budget is 2"):
        compare(Shallow(), 2, out=tmp_path / "x")
    with pytest.raises(IncompatibleInputError, match="divides none"):
        compare(
            Shallow(), 0.5, space=SearchSpace(num_blocks=(7,), uniform=True), out=tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()
