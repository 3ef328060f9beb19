"""Cells whose noise could flip the plan: found by their intervals, and measured again.

At a price of latency (loss per microsecond, from two neighbouring exact plans) every option of a
layer has a value, loss + price * time.  A cell is doubtful if, somewhere within its interval and
that of the chosen cell, another choice would be clearly better for the layers that share it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from blast_search.engine import Engine
from blast_search.errors import InfeasibleBudgetError
from blast_search.plan import Choices
from blast_search.space import DENSE, Candidate, LayerSpec
from blast_search.tables import Cell, LatencyTable, Option

GAIN = 0.005  # of the plan's whole value: less is not worth a second measurement
MOST = 24  # cells
PRICE_STEP = 0.97  # of a ratio: the neighbouring plan that gives the price of latency

Key = tuple[int, int, bool, int, Candidate]


def doubtful(engine: Engine, ratio: float) -> list[Cell]:
    """The cells whose noise could flip the exact plan for a ratio."""
    if not engine.by_time or engine.space.uniform:
        return []
    try:
        choices, faster = engine.exact(ratio), engine.exact(PRICE_STEP * ratio)
    except InfeasibleBudgetError:
        return []
    latency = engine.latency
    lost = engine.predicted_loss(faster) - engine.predicted_loss(choices)
    saved = (latency.ratio(choices) or 0.0) - (latency.ratio(faster) or 0.0)
    if lost <= 0 or saved <= 0:
        return []
    price = lost / (saved * latency.dense_us)
    return doubtful_cells(engine.layers, latency.table, engine.options(), choices, price)


def doubtful_cells(
    layers: Sequence[LayerSpec],
    table: LatencyTable,
    options: Mapping[str, Sequence[Option]],
    choices: Choices,
    price: float,
) -> list[Cell]:
    """The cells that could flip an exact plan, most harmful first, at most MOST.

    Args:
        options: by layer; time in microseconds per model call, corrected, and loss.
        choices: the exact plan. price: loss per microsecond at its budget.
    """
    widths = {_key(cell): m.uncertainty for cell, m in table.cells.items() if m}
    by_key = {_key(cell): cell for cell in table.cells}
    gains: dict[Cell, float] = defaultdict(float)
    whole = 0.0
    for layer in layers:
        bounds = {o.candidate: _bounds(layer, o, widths) for o in options[layer.name]}
        mine = next(o for o in options[layer.name] if o.candidate == choices[layer.name])
        whole += mine.loss + price * mine.cost_us
        for other in options[layer.name]:
            late = price * (bounds[mine.candidate][1] - mine.cost_us)
            early = price * (other.cost_us - bounds[other.candidate][0])
            ahead = other.loss - mine.loss + price * (other.cost_us - mine.cost_us)
            gain = late + early - max(ahead, 0.0)
            if other is not mine and gain > 0:
                for cell in _cells(layer, (mine.candidate, other.candidate), by_key):
                    gains[cell] += gain
    found = [cell for cell in sorted(gains, key=lambda c: -gains[c]) if gains[cell] > GAIN * whole]
    return found[:MOST]


def _cells(
    layer: LayerSpec, candidates: Iterable[Candidate], by_key: Mapping[Key, Cell]
) -> list[Cell]:
    keys = [(*layer.shape, layer.bias, call.tokens, c) for c in candidates for call in layer.calls]
    return [by_key[key] for key in keys if key in by_key and not key[4].is_dense]


def _bounds(layer: LayerSpec, option: Option, widths: Mapping[Key, float]) -> tuple[float, float]:
    """The least and the largest time within the cells' intervals."""
    if option.candidate == DENSE:
        return option.cost_us, option.cost_us
    width = max(
        widths.get((*layer.shape, layer.bias, call.tokens, option.candidate), 0.0)
        for call in layer.calls
    )
    return (1 - width) * option.cost_us, (1 + width) * option.cost_us


def _key(cell: Cell) -> Key:
    return *cell.place, cell.candidate
