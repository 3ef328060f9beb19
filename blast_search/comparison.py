"""The table of `compare`, what it says about the search, and its files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rich.table
from rich.box import SIMPLE_HEAD
from rich.text import Text
from scipy.stats import t as student

from blast_search.document import Paragraph, Section, Table, show, show_range, to_markdown
from blast_search.files import write_json, write_rows, write_text
from blast_search.model_latency import Timing

SEARCH = "full search"
FIELDS = (
    "contender", "description", "within_budget", "metric_before", "metric_after_mean",
    "metric_after_ci95_low", "metric_after_ci95_high", "seeds", "measured_layer_latency_ratio",
    "measured_layer_latency_ratio_ci95_low", "measured_layer_latency_ratio_ci95_high",
    "measured_model_latency_ratio", "macs_ratio", "params_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean, and its 95 % interval by Student's t; None from a single value."""

    mean: float
    ci95: tuple[float, float] | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, None)
        error = statistics.stdev(values) / len(values) ** 0.5
        half = float(student.ppf(0.975, len(values) - 1)) * error
        return cls(mean, (mean - half, mean + half))


@dataclass(frozen=True)
class Row:
    """One contender: metric before retraining, after it (one value per seed), measured times."""

    name: str
    description: str
    within: bool
    before: float
    after: tuple[float, ...] = ()
    timing: Timing | None = None  # None: dense
    macs_ratio: float = 1.0
    params_ratio: float = 1.0
    choices: dict[str, str] = field(default_factory=dict)

    @property
    def layer_ratio(self) -> float:
        return self.timing.ratio_layers if self.timing else 1.0

    @property
    def model_ratio(self) -> float:
        return self.timing.ratio_model if self.timing else 1.0

    @property
    def final(self) -> tuple[float, ...]:
        """What the contender ends at: after retraining where there was any."""
        return self.after or (self.before,)


@dataclass(frozen=True)
class Comparison:
    """The finished comparison.  `facts`: task, budget, steps, seeds, what the trials brought,
    kinds without plans, environment."""

    folder: Path
    metric: str
    higher_is_better: bool
    facts: dict[str, Any]
    rows: list[Row]

    # ---- what it says -------------------------------------------------------------------

    @property
    def verdicts(self) -> list[str]:
        """The search against every other contender, ties and losses included."""
        found = next((row for row in self.rows if row.name == SEARCH), None)
        if found is None:
            return []
        others = [row for row in self.rows if row.name not in (SEARCH, "dense")]
        return [self._verdict(found, row) for row in others] + self._kept(found)

    @property
    def missed(self) -> str:
        """Why no plan of the search meets the budget ("": one does)."""
        return str(self.facts.get("missed", ""))

    @property
    def without_plans(self) -> list[str]:
        """The kinds of structures that are not in the table, in a sentence each."""
        absent: dict[str, str] = self.facts.get("without_plans", {})
        return [f"Not in the table: {kind}, {reason}." for kind, reason in absent.items()]

    def _kept(self, search: Row) -> list[str]:
        """What `blast-search search` itself would end with: the best of its pool, retrained."""
        pool = [r for r in self.rows if r.name in ("uniform low rank", "uniform BLAST")]
        sign = 1 if self.higher_is_better else -1
        within = [search, *(row for row in pool if row.within)]
        best = max(within, key=lambda r: (sign * statistics.fmean(r.final), r is search))
        if best is search or best.choices == search.choices:
            return []
        return [
            f"The verb search would keep the {best.name} plan here: of its own plan and the two "
            "uniform ones it takes the one that is best in the end."
        ]

    def _verdict(self, search: Row, other: Row) -> str:
        over = " and ".join(row.name for row in (search, other) if not row.within)
        if not over and search.choices == other.choices:
            return f"{other.name}: a tie, the search ended at the same plan."
        result, evidence = self._gain(search, other)
        if not over:
            return f"{other.name}: {result}, {evidence}."
        ratios = f"layer latency {other.layer_ratio:.3f}; the search {search.layer_ratio:.3f}"
        if search.within and result == "a win":
            return f"{other.name}: a win, although it is over the budget ({ratios}), {evidence}."
        return (
            f"{other.name}: no comparison at equal latency, {over} is over the budget ({ratios})."
        )

    def _gain(self, search: Row, other: Row) -> tuple[str, str]:
        """A win, a tie or a loss of the search by its final metric, and the figures.

        What is lower where it is better (perplexity, an error) is positive and varies by factors,
        so it is compared by its logarithm: of differences, a rival's wild spread would make a tie
        of being a thousand times better.
        """
        pairs = list(zip(search.final, other.final, strict=True))
        by_factor = not self.higher_is_better and all(min(pair) > 0 for pair in pairs)
        if by_factor:
            gain = Interval.of([math.log(b / a) for a, b in pairs])
            size = f"{self.metric} {math.exp(-gain.mean):.4g} times the other's"
        else:
            sign = 1 if self.higher_is_better else -1
            gain = Interval.of([sign * (a - b) for a, b in pairs])
            size = f"{self.metric} {abs(gain.mean):.4g} {'better' if gain.mean >= 0 else 'worse'}"
        if gain.ci95 is None:
            result = "a tie" if gain.mean == 0 else "a win" if gain.mean > 0 else "a loss"
            return result, f"{size}; no interval from one value"
        low, high = gain.ci95
        result = "a win" if low > 0 else "a loss" if high < 0 else "a tie"
        interval = f"95% interval of the gain {low:+.4g} to {high:+.4g}"
        if by_factor:
            interval = f"95% interval {math.exp(-high):.4g} to {math.exp(-low):.4g}"
        return result, f"{size} ({interval} over {len(pairs)} seeds)"

    # ---- how it is shown ----------------------------------------------------------------

    @property
    def head(self) -> list[str]:
        return [
            "contender", f"{self.metric} before retraining", f"{self.metric} after retraining",
            "layer latency ratio", "model latency ratio", "MACs ratio", "parameter ratio",
        ]  # fmt: skip

    def cells(self, row: Row) -> list[str]:
        after = "-"
        if row.after:
            interval = Interval.of(row.after)
            after = show(interval.mean, ".4g")
            if interval.ci95:
                after += f" ± {interval.mean - interval.ci95[0]:.2g}"
        layer = show(row.layer_ratio) + ("" if row.within else " (over)")
        ratios = [show(row.model_ratio), show(row.macs_ratio), show(row.params_ratio)]
        return [show(row.before, ".4g"), after, layer, *ratios]

    @property
    def caption(self) -> str:
        better = "Higher" if self.higher_is_better else "Lower"
        seeds, steps = self.facts["seeds"], self.facts["retrain_steps"]
        text = (
            f"{better} is better for {self.metric}. Budget (scope layers): the searched layers "
            f"take at most {self.facts['budget']:g} of their dense latency; (over): no plan of "
            "that kind does. Latency is measured side by side in one process, MACs and "
            "parameters are counted; ratios are to dense."
        )
        if not steps:
            return f"{text} No retraining."
        spread = ", ±: 95% interval of the mean (Student's t)" if seeds > 1 else ""
        return f"{text} Retraining: {steps} steps, {seeds} seed{'s' * (seeds > 1)}{spread}."

    def table(self) -> rich.table.Table:
        """For the terminal."""
        view = rich.table.Table(
            caption=Text(self.caption, style="dim"),
            caption_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for index, title in enumerate(self.head):
            width = {0: 30, 2: 16, 3: 12}.get(index, 10)
            view.add_column(
                Text(title), justify="right" if index else "left", vertical="bottom",
                max_width=width, overflow="fold",
            )  # fmt: skip
        for row in self.rows:
            label = Text(row.name).append(f"\n{row.description}", style="dim")
            cells = (Text(cell) for cell in self.cells(row))
            view.add_row(label, *cells, style="bold" if row.name == SEARCH else None)
        return view

    def markdown(self) -> str:
        strong = next((i for i, row in enumerate(self.rows) if row.name == SEARCH), None)
        rows = [[f"{row.name} ({row.description})", *self.cells(row)] for row in self.rows]
        env = self.facts["environment"]
        intervals = "; ".join(
            f"{row.name} {show_range(row.timing.ratio_layers_ci95)}"
            for row in self.rows
            if row.timing
        )
        circumstances = (
            f"Measured on {env['device']} ({env['capability']}, {env['threads']} threads, "
            f"{env['dtype']}), torch {env['torch']}, Python {env['python']}, "
            f"{self.facts['date']}. The search evaluated "
            f"{self.facts['loss_evaluations_of_the_search']} whole models on calibration data, "
            f"seed {self.facts['search_seed']}. 95% intervals of the layer latency ratios: "
            f"{intervals}."
        )
        missed = self.missed[:1].upper() + self.missed[1:]
        remarks = (missed, *self.without_plans, self.facts["trials"], circumstances)
        sections = [
            Section("", [Table(self.head, rows, strong=strong), Paragraph(self.caption)]),
            Section("The search against", [Paragraph(text) for text in self.verdicts]),
            Section("", [Paragraph(text) for text in remarks if text]),
        ]
        return to_markdown(f"{self.facts['task']} at {self.facts['budget']:g}", sections)

    # ---- files --------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        rows = [
            asdict(row) | {"layer_latency_ratio": row.layer_ratio,
                           "model_latency_ratio": row.model_ratio}
            for row in self.rows
        ]  # fmt: skip
        metric = {"name": self.metric, "higher_is_better": self.higher_is_better}
        return self.facts | {"metric": metric, "rows": rows, "verdicts": self.verdicts}

    def csv_rows(self) -> list[dict[str, Any]]:
        found = []
        for row in self.rows:
            after = Interval.of(row.after) if row.after else None
            low, high = (after.ci95 if after else None) or ("", "")
            layers = row.timing.ratio_layers_ci95 if row.timing else (1.0, 1.0)
            mean = after.mean if after else ""
            values = (
                row.name, row.description, int(row.within), row.before, mean, low, high,
                len(row.after), row.layer_ratio, *layers, row.model_ratio, row.macs_ratio,
                row.params_ratio,
            )  # fmt: skip
            found.append(dict(zip(FIELDS, map(_short, values), strict=True)))
        return found

    def write(self) -> None:
        """compare.csv, compare.md and compare.json."""
        write_rows(self.folder / "compare.csv", FIELDS, self.csv_rows())
        write_text(self.folder / "compare.md", self.markdown())
        write_json(self.folder / "compare.json", self.to_json())


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
