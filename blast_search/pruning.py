"""Which cells are worth measuring: a few per block count predict the rest.

Between measured ranks a candidate's latency ratio is close to linear in the rank (its work is), so
the smallest, a middle and the largest rank of each block count predict the others.  A cell is left
out only where no search could choose its candidate, by time alone and whatever the weights are:

1. it would be slower than dense, or
2. another candidate would be no slower and represents every matrix that it does: more rank, and a
   block count that is a multiple (b = 2, rank r is b = 4, rank r with factors repeated).

Predictions only decide what is measured; nothing predicted enters the table.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from blast_search.space import DENSE, Candidate, LayerSpec
from blast_search.tables import Cell, LatencyTable, Measurement, Place

MARGIN = 0.08  # for the error of a prediction, on either side


def seed_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Dense, and the smallest, a middle and the largest rank of each block count."""
    groups: dict[tuple[object, ...], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[*cell.place, cell.candidate.num_blocks].append(cell)
    seeds: list[Cell] = []
    for members in groups.values():
        ordered = sorted(members, key=lambda cell: cell.candidate.rank)
        middle = (ordered[0].candidate.rank + ordered[-1].candidate.rank) / 2
        nearest = min(ordered, key=lambda cell: abs(cell.candidate.rank - middle))
        seeds += dict.fromkeys((ordered[0], nearest, ordered[-1]))
    return seeds


def promising_cells(
    layers: Sequence[LayerSpec], cells: Sequence[Cell], table: LatencyTable
) -> list[Cell]:
    """The cells whose candidate some layer could choose, as `seed_cells` predict them.

    Others may be in the table, too: a run that is resumed must want the same cells as before.
    """
    by_place: dict[Place, dict[Candidate, Cell]] = defaultdict(dict)
    for cell in cells:
        by_place[cell.place][cell.candidate] = cell
    seeds = {cell: table.cells.get(cell) for cell in seed_cells(cells)}
    ratios = {place: _ratios(group, seeds) for place, group in by_place.items()}
    twins = table.dense_us()
    wanted: set[Cell] = set()
    for layer in layers:
        places = [(*layer.shape, layer.bias, call.tokens) for call in layer.calls]
        known = set.intersection(*(set(ratios[place]) for place in places))
        costs = {
            c: sum(
                call.weight * ratios[place][c] * twins[place]
                for call, place in zip(layer.calls, places, strict=True)
            )
            for c in known
        }
        for candidate in costs:
            if not _hopeless(candidate, costs):
                wanted |= {by_place[place][candidate] for place in places}
    return [cell for cell in cells if cell in wanted]


def _hopeless(candidate: Candidate, costs: Mapping[Candidate, float]) -> bool:
    if candidate.is_dense:
        return False
    best = (1 - MARGIN) * costs[candidate]
    b, r = candidate.num_blocks, candidate.rank
    return best >= costs.get(DENSE, math.inf) or any(  # a failed one is told of later
        other.num_blocks % b == 0 and other.rank >= r and other != candidate
        and (1 + MARGIN) * cost <= best
        for other, cost in costs.items()
        if not other.is_dense
    )  # fmt: skip


def _ratios(
    group: Mapping[Candidate, Cell], seeds: Mapping[Cell, Measurement | None]
) -> dict[Candidate, float]:
    """Measured ratios to dense, and in between linear in the rank, of one shape's candidates."""
    known: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for candidate, cell in sorted(group.items()):
        if measured := seeds.get(cell):
            known[candidate.num_blocks].append((candidate.rank, measured.ratio))
    found = {}
    for candidate in group:
        if points := known.get(candidate.num_blocks):
            ranks, values = zip(*points, strict=True)
            found[candidate] = float(np.interp(candidate.rank, ranks, values))
    return found
