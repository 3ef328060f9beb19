"""The measured tables as plain data (no torch).

A Measurement was timed on a device; a score is a prediction.  They are different types, and
neither is ever stored or printed as the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from blast_search.errors import IncompatibleInputError
from blast_search.files import append_row, finite, read_rows
from blast_search.space import DENSE, Candidate, LayerSpec

Place = tuple[int, int, bool, int]  # out_features, in_features, bias, tokens


@dataclass(frozen=True)
class Cell:
    """One thing to time: a layer shape, a token count, a candidate, on one kind of device."""

    device: str  # fingerprint of device, driver, torch and thread count
    mode: str  # how the call is made: "eager"
    dtype: str
    kernel: str  # the implementation chosen for this candidate (kernels.choose)
    out_features: int
    in_features: int
    bias: bool
    tokens: int
    candidate: Candidate

    @property
    def place(self) -> Place:
        """The dense layer and token count that its candidates compete for."""
        return self.out_features, self.in_features, self.bias, self.tokens


@dataclass(frozen=True)
class Measurement:
    """Microseconds of repeated calls, and the median of the dense twin timed in between.

    `ratio` is the median over rounds of candidate / dense: machine drift cancels in it; ratio_low
    and ratio_high bound it with 95 % confidence.  `other_load` is the share of the processors
    that other programs took meanwhile.
    """

    median_us: float
    p10_us: float
    p90_us: float
    runs: int
    dense_us: float
    ratio: float
    ratio_low: float
    ratio_high: float
    other_load: float = 0.0

    @property
    def uncertainty(self) -> float:
        """Half the width of the ratio's interval, relative to its middle."""
        return (self.ratio_high - self.ratio_low) / (self.ratio_high + self.ratio_low)


FIELDS = (
    "device", "mode", "dtype", "kernel", "out_features", "in_features", "bias", "tokens",
    "candidate", "median_us", "p10_us", "p90_us", "runs", "dense_us", "ratio",
    "ratio_low", "ratio_high", "other_load", "status",
)  # fmt: skip


def cell_row(cell: Cell, measured: Measurement | None, status: str = "ok") -> dict[str, Any]:
    """A cell and its result as a CSV row; a cell that always fails has no numbers."""
    values = vars(measured) if measured else {}
    numbers = {k: v if isinstance(v, int) else f"{v:.6g}" for k, v in values.items()}
    return (
        dict.fromkeys(FIELDS, "")
        | vars(cell)
        | {"bias": int(cell.bias), "candidate": cell.candidate.key}
        | numbers
        | {"status": status}
    )


@dataclass
class LatencyTable:
    """Measured cells of one device; `path` (if any) receives every new cell durably."""

    device: str
    path: Path | None = None
    cells: dict[Cell, Measurement | None] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, device: str, mode: str | None = None) -> LatencyTable:
        """The table in `path` (created by the first `add`); `mode`, if given, is all cells' mode.

        Raises:
            IncompatibleInputError: a damaged row, or cells of another device or mode.
        """
        table = cls(device, path)
        for line, row in enumerate(read_rows(path, FIELDS), start=2):
            cell, measured = _parse_row(row, f"{path}, line {line}")
            asked = (("on device", cell.device, device), ("in mode", cell.mode, mode or cell.mode))
            for how, found, mine in asked:
                if found != mine:
                    raise IncompatibleInputError(
                        f"{path}, line {line}: measured {how} {found}, this is {mine}. Latencies "
                        "do not carry over: use another run folder (--out) here."
                    )
            table.cells[cell] = measured
        return table

    def add(self, cell: Cell, measured: Measurement | None, status: str = "ok") -> None:
        """Add a cell; what is used is what is on file, so that a resumed run sees the same."""
        if measured is None and status == "ok":
            status = "failed"
        row = cell_row(cell, measured, status)
        if self.path:
            append_row(self.path, FIELDS, row)
        self.add_row(row, "a new cell")

    def add_row(self, row: Mapping[str, Any], origin: str) -> None:
        """Add a cell from its row (cell_row), in memory only."""
        cell, measured = _parse_row({k: str(v) for k, v in row.items()}, origin)
        self.cells[cell] = measured

    def add_rows(self, rows: Any, origin: str) -> None:
        """Add cells from a JSON value that should be a list of rows.

        Raises:
            IncompatibleInputError: it is none, or a row is damaged.
        """
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and set(row) == set(FIELDS) for row in rows
        ):
            raise IncompatibleInputError(
                f"{origin}: expected a list of cells. Remove the damaged line; they will be "
                "measured again."
            )
        for row in rows:
            self.add_row(row, origin)

    def merge(self, other: LatencyTable, cells: Iterable[Cell] | None = None) -> int:
        """Take over what another table of this device knows better; returns how many cells.

        A measurement is better than a failure.  Of two measurements the more certain one stays,
        so that the order of merging does not matter.

        Args:
            cells: only these.

        Raises:
            IncompatibleInputError: a table of another device.
        """
        if other.device != self.device:
            raise IncompatibleInputError(
                f"{other.path or 'the table'} was measured on device {other.device}, "
                f"{self.path or 'the other'} on {self.device}: latencies do not carry over. "
                "Merge only tables of one fingerprint."
            )
        taken = 0
        for cell in other.cells if cells is None else cells:
            theirs, mine = other.cells.get(cell), self.cells.get(cell)
            if theirs and (mine is None or _rank(theirs) < _rank(mine)):
                self.add(cell, theirs)
                taken += 1
            elif cell in other.cells and cell not in self.cells:
                self.add(cell, None, "failed in a merged table")
                taken += 1
        return taken

    def costs(self, layer: LayerSpec) -> dict[Candidate, float]:
        """Microseconds per model call of every candidate measured for all of a layer's calls.

        The dense time of a shape is the median over all its twins; a candidate costs its
        interleaved ratio times that.
        """
        twins = self.dense_us()
        ratios: dict[tuple[int, Candidate], float] = {}
        for cell, measured in self.cells.items():
            if measured and cell.place[:3] == (*layer.shape, layer.bias):
                ratios[cell.tokens, cell.candidate] = measured.ratio
        costs: dict[Candidate, float] = {}
        for candidate in {candidate for _, candidate in ratios} | {DENSE}:
            parts = []
            for call in layer.calls:
                dense = twins.get((*layer.shape, layer.bias, call.tokens))
                ratio = 1.0 if candidate.is_dense else ratios.get((call.tokens, candidate))
                if dense is None or ratio is None:
                    break
                parts.append(call.weight * dense * ratio)
            else:
                costs[candidate] = sum(parts)
        return costs

    def dense_us(self) -> dict[Place, float]:
        """The dense time of each (out_features, in_features, bias, tokens)."""
        samples: dict[Place, list[float]] = defaultdict(list)
        for cell, measured in self.cells.items():
            if measured:
                samples[cell.place].append(measured.dense_us)
        return {key: median(values) for key, values in samples.items()}


def _rank(measured: Measurement) -> tuple[float, float]:
    return measured.uncertainty, measured.median_us


def merge_files(sources: Sequence[Path], target: Path) -> LatencyTable:
    """Merge the tables of several runs or clusters into `target`, new or existing.

    Raises:
        IncompatibleInputError: no cells, a damaged row, tables of several devices.
    """
    rows = [row for path in sources for row in read_rows(path, FIELDS)[:1]]
    if not rows:
        raise IncompatibleInputError(
            f"no measured cells in {', '.join(map(str, sources))}, expected tables (latency.csv) "
            "of `blast-search profile`. Check the paths."
        )
    merged = LatencyTable.open(target, rows[0]["device"])
    for path in sources:
        merged.merge(LatencyTable.open(path, merged.device))
    return merged


def _parse_row(row: Mapping[str, str], origin: str) -> tuple[Cell, Measurement | None]:
    try:
        cell = Cell(
            row["device"], row["mode"], row["dtype"], row["kernel"],
            int(row["out_features"]), int(row["in_features"]), bool(int(row["bias"])),
            int(row["tokens"]), Candidate.from_key(row["candidate"]),
        )  # fmt: skip
        if row["status"] != "ok":
            return cell, None
        measured = Measurement(
            float(row["median_us"]), float(row["p10_us"]), float(row["p90_us"]),
            int(row["runs"]), float(row["dense_us"]), float(row["ratio"]),
            float(row["ratio_low"]), float(row["ratio_high"]), float(row["other_load"]),
        )  # fmt: skip
    except (ValueError, IncompatibleInputError) as error:
        raise IncompatibleInputError(
            f"{origin}: {error}. Remove the damaged line; the cell will be measured again."
        ) from error
    if not (0 < measured.ratio < float("inf") and 0 < measured.dense_us < float("inf")):
        raise IncompatibleInputError(
            f"{origin}: ratio {measured.ratio:g} and {measured.dense_us:g} us for dense, expected "
            "positive and finite latencies. Remove the damaged line; the cell will be measured "
            "again."
        )
    return cell, measured


@dataclass(frozen=True)
class Score:
    """Predicted harm of a candidate: its layer's relative error, and the model's added loss."""

    error: float
    loss: float


@dataclass
class ScoreTable:
    """Predicted scores by layer and candidate."""

    scores: dict[str, dict[Candidate, Score]] = field(default_factory=dict)

    FIELDS = ("layer", "candidate", "predicted_error", "predicted_loss_increase")

    def rows(self) -> list[dict[str, Any]]:
        return [
            dict(zip(self.FIELDS, (layer, c.key, f"{s.error:.6g}", f"{s.loss:.6g}"), strict=True))
            for layer, scores in self.scores.items()
            for c, s in scores.items()
        ]

    @classmethod
    def read(cls, path: Path) -> ScoreTable:
        table = cls()
        for row in read_rows(path, cls.FIELDS):
            try:
                candidate = Candidate.from_key(row["candidate"])
                score = Score(finite(row[cls.FIELDS[2]]), finite(row[cls.FIELDS[3]]))
            except (ValueError, IncompatibleInputError) as error:
                raise IncompatibleInputError(
                    f"{path}, layer {row['layer']}: {error}. Make the file again with --resume "
                    f"{path.parent}."
                ) from error
            table.scores.setdefault(row["layer"], {})[candidate] = score
        return table


@dataclass(frozen=True)
class Option:
    """One choice of a layer as the solver sees it."""

    candidate: Candidate
    cost_us: float
    loss: float


def layer_options(
    layers: Iterable[LayerSpec],
    costs_of: Callable[[str], Mapping[Candidate, float]],
    scores: ScoreTable,
    floor: float = 1.0,
) -> dict[str, list[Option]]:
    """Per layer, the candidates that are measured and scored.

    A candidate slower than `floor` times dense is dropped: dense is exact and faster.

    Args:
        costs_of: what a layer's candidates cost, by its name (LatencyModel.costs).
    """
    options: dict[str, list[Option]] = {}
    for layer in layers:
        costs = costs_of(layer.name)
        dense = costs[DENSE]
        found = [Option(DENSE, dense, 0.0)]
        for candidate, score in scores.scores.get(layer.name, {}).items():
            cost = costs.get(candidate)
            if cost is not None and cost < dense * floor and not candidate.is_dense:
                found.append(Option(candidate, cost, max(score.loss, 0.0)))
        options[layer.name] = found
    return options


def corrected(
    options: Mapping[str, Sequence[Option]], factor: Callable[[Candidate], float]
) -> dict[str, list[Option]]:
    """Options that cost `factor` times their cells."""
    return {
        name: [replace(o, cost_us=o.cost_us * factor(o.candidate)) for o in items]
        for name, items in options.items()
    }
