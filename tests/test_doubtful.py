"""Cells whose noise could flip the plan, on tables made for the purpose."""

from __future__ import annotations

from blast_search.doubtful import doubtful_cells
from blast_search.space import DENSE, Call, Candidate, LayerSpec
from blast_search.tables import Cell, LatencyTable, Measurement, Option

LAYERS = [LayerSpec(f"l{i}", 64, 64, True, (Call(8),)) for i in range(4)]
SMALL, LARGE = Candidate(1, 4), Candidate(1, 8)


def measured(ratio: float, half: float) -> Measurement:
    low, high = ratio * (1 - half), ratio * (1 + half)
    return Measurement(1, 1, 1, 9, 100.0, ratio, low, high)


def table(half: float) -> LatencyTable:
    found = LatencyTable("d")
    for candidate, ratio in ((DENSE, 1.0), (SMALL, 0.4), (LARGE, 0.5)):
        width = 0.0 if candidate is DENSE else half
        found.add(
            Cell("d", "eager", "float32", "k", 64, 64, True, 8, candidate), measured(ratio, width)
        )
    return found


def options(loss_small: float) -> dict[str, list[Option]]:
    choices = [Option(SMALL, 40.0, loss_small), Option(LARGE, 50.0, 1.0), Option(DENSE, 100.0, 0)]
    return {layer.name: choices for layer in LAYERS}


def doubtful(half: float, loss_small: float, price: float = 0.1) -> set[Candidate]:
    chosen = dict.fromkeys((layer.name for layer in LAYERS), LARGE)
    cells = doubtful_cells(LAYERS, table(half), options(loss_small), chosen, price)
    return {cell.candidate for cell in cells}


def test_a_near_tie_within_the_noise_is_doubtful():
    # LARGE: 1.0 + 0.1 * 50 = 6.0; SMALL: 2.1 + 0.1 * 40 = 6.1, less within 5 % of its time.
    assert doubtful(0.05, loss_small=2.1) == {SMALL, LARGE}


def test_narrow_intervals_and_clear_choices_are_not():
    assert doubtful(0.002, loss_small=2.1) == set()
    assert doubtful(0.05, loss_small=9.0) == set()
    assert doubtful(0.05, loss_small=2.1, price=0.0) == set()
