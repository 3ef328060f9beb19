"""The front as a picture: measured loss against layer latency."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blast_search.errors import IncompatibleInputError
from blast_search.files import finite, read_rows
from blast_search.plan import CHOSEN, FrontPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class FrontRow:
    """A line of front.csv; None where nothing was predicted or measured."""

    name: str
    predicted_ratio: float | None
    measured_ratio: float | None
    predicted_loss: float | None
    loss: float | None
    on_front: bool

    @property
    def ratio(self) -> float | None:
        return self.predicted_ratio if self.measured_ratio is None else self.measured_ratio


def read_front(path: Path) -> list[FrontRow]:
    """The rows of front.csv; [] where there is no file.

    Raises:
        IncompatibleInputError: a damaged file.
    """
    rows = []
    columns = (*FrontPoint.FIELDS[1:5], *FrontPoint.SIZES)
    for line, row in enumerate(read_rows(path, FrontPoint.FIELDS, FrontPoint.SIZES), start=2):
        try:
            a, b, c, d, *_ = (finite(row[f]) if row[f] else None for f in columns)
        except ValueError as error:
            raise IncompatibleInputError(
                f"{path}, line {line}: {error}, expected a number. Make the file again with "
                f"--resume {path.parent}."
            ) from error
        rows.append(FrontRow(row["name"], a, b, c, d, row["on_front"] == "1"))
    return rows


@dataclass(frozen=True)
class Kind:
    """How one group of plans is drawn; colours are Okabe and Ito's, told apart by shape too."""

    label: str
    colour: str
    marker: str
    size: float


KINDS = {
    "low rank": Kind("uniform low rank", "#009E73", "s", 52),
    "uniform": Kind("uniform BLAST", "#E69F00", "^", 62),
    "trial": Kind("trial", "#7A7A7A", "o", 36),
    "exact": Kind("exact solution", "#0072B2", "D", 48),
    "dense": Kind("dense", "#000000", "P", 90),
    "searched": Kind("searched plan", "#CC79A7", "X", 80),
    CHOSEN: Kind("chosen plan", "#D55E00", "*", 300),
}  # drawn in this order, the last one on top


def kind_of(name: str) -> str:
    """The group of a plan, by its name in front.csv."""
    words = name.split() or [""]
    if words[0] == "uniform":
        return "low rank" if "b1" in words else "uniform"
    return words[0] if words[0] in KINDS else "trial"


def front_png(
    rows: Sequence[FrontRow], budget: float | None = None, budget_label: str = "budget"
) -> bytes | None:
    """The picture as PNG data; None where no plan's loss was measured.

    Args:
        budget: where to draw the vertical line, as a layer latency ratio.
    """
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row.loss is not None and row.ratio is not None]
    if CHOSEN not in (row.name for row in rows):  # it is the searched plan
        drawn = [replace(r, name=CHOSEN) if r.name == "searched" else r for r in drawn]
    if not drawn:
        return None
    style: dict[str, Any] = {"fontsize": 12}
    figure = Figure(figsize=(7.6, 5.4), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    places = [row.ratio for row in drawn if row.ratio is not None]
    places += [budget] if budget is not None else []
    low, high = min(places), max(places)
    edge = 0.05 * (high - low) or 0.05
    axes.set_xlim(low - edge, high + edge)
    positive = [row.loss for row in drawn if row.loss is not None and row.loss > 0]
    logarithmic = bool(positive) and max(positive) > 20 * min(positive)
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(min(positive) / 1.8, max(positive) * 1.8)
    _draw_front(axes, drawn, logarithmic)
    for key, kind in KINDS.items():
        _draw_kind(axes, kind, [row for row in drawn if kind_of(row.name) == key], logarithmic)
    if budget is not None:
        axes.axvline(budget, color="#444444", linestyle=(0, (5, 3)), linewidth=1.5, zorder=1)
        side = "left" if budget < low + 0.2 * (high - low) else "center"
        axes.annotate(
            budget_label, (budget, 1), xycoords=("data", "axes fraction"), xytext=(0, 5),
            textcoords="offset points", ha=side, va="bottom", fontsize=11, color="#444444",
        )  # fmt: skip
    _legend(axes, drawn)
    axes.set_xlabel("layer latency ratio (dense = 1)", **style)
    axes.set_ylabel("measured loss (distance to dense)", **style)
    axes.tick_params(labelsize=11)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="white", metadata={"Software": None})
    return stream.getvalue()


def _draw_front(axes: Axes, rows: Sequence[FrontRow], logarithmic: bool) -> None:
    points = [
        (row.ratio, row.loss)
        for row in rows
        if row.on_front and row.ratio is not None and row.loss is not None
        and (row.loss > 0 or not logarithmic)
    ]  # fmt: skip
    if len(points) > 1:
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, color="#0072B2", linewidth=1.6, alpha=0.45, zorder=2, label="front")


def _draw_kind(axes: Axes, kind: Kind, rows: Sequence[FrontRow], logarithmic: bool) -> None:
    """Filled where the latency was measured, hollow where it was predicted."""
    for row in rows:
        x, y = row.ratio, row.loss
        if x is None or y is None:
            continue
        filled = row.measured_ratio is not None
        edge = "#000000" if kind.marker == "*" else kind.colour
        look: dict[str, Any] = {
            "marker": kind.marker, "s": kind.size, "edgecolors": edge if filled else kind.colour,
            "facecolors": kind.colour if filled else "none", "linewidths": 1.0 if filled else 1.6,
            "zorder": 3 + list(KINDS.values()).index(kind),
        }  # fmt: skip
        if logarithmic and y <= 0:  # a loss of 0 has no place on a log scale: on the lower edge
            axes.scatter([x], [0.0], transform=axes.get_xaxis_transform(), clip_on=False, **look)
            axes.annotate(
                "loss 0", (x, 0), xycoords=("data", "axes fraction"), xytext=(0, 10),
                textcoords="offset points", ha="center", fontsize=11,
            )  # fmt: skip
        else:
            axes.scatter([x], [y], **look)


def _legend(axes: Axes, rows: Sequence[FrontRow]) -> None:
    from matplotlib.lines import Line2D

    def mark(marker: str, colour: str, size: float, label: str, filled: bool = True) -> Line2D:
        return Line2D(
            [], [], linestyle="none", marker=marker, markersize=size, label=label,
            markeredgecolor=colour, markerfacecolor=colour if filled else "none",
        )  # fmt: skip

    present = {kind_of(row.name) for row in rows}
    handles: list[Any] = [
        mark(kind.marker, kind.colour, kind.size**0.5 * 0.95, kind.label)
        for key, kind in KINDS.items()
        if key in present
    ]
    handles += [line for line in axes.get_lines() if line.get_label() == "front"]
    handles.append(mark("o", "#444444", 6.5, "filled: latency measured"))
    if any(row.measured_ratio is None for row in rows):
        handles.append(mark("o", "#444444", 6.5, "hollow: latency predicted", filled=False))
    axes.figure.legend(
        handles=handles, loc="outside lower center", ncols=3, fontsize=11, frameon=False,
        handletextpad=0.4, columnspacing=1.4,
    )  # fmt: skip
