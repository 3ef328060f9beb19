"""Pruned profiles: what is left out could not have been chosen."""

from __future__ import annotations

import pytest
import torch

from blast_search.latency import cells_for
from blast_search.pruning import promising_cells, seed_cells
from blast_search.space import DENSE, Call, LayerSpec, SearchSpace
from blast_search.tables import LatencyTable, Measurement

LAYER = LayerSpec("a", 256, 256, True, (Call(8), Call(64, 0.5)))
CELLS = cells_for([LAYER], SearchSpace(), "d", torch.float32, "cpu")


def measured(ratio: float) -> Measurement:
    return Measurement(100 * ratio, 90 * ratio, 110 * ratio, 20, 100.0, ratio, ratio, ratio)


def pruned(time) -> tuple[LatencyTable, list]:
    """The table of a pruned profile of a device on which cells take `time(cell)`."""
    table = LatencyTable("d")
    for cell in seed_cells(CELLS):
        table.add(cell, measured(time(cell)))
    return table, promising_cells([LAYER], CELLS, table)


def linear(cell) -> float:
    c = cell.candidate
    return 1.0 if c.is_dense else 0.05 + 0.007 * c.rank * (1 + 0.2 * c.num_blocks)


def test_seeds_are_dense_and_three_ranks_of_each_block_count():
    seeds = [cell.candidate for cell in seed_cells(CELLS) if cell.tokens == 8]
    assert seeds.count(DENSE) == 1
    for b in (1, 2, 4, 8):
        mine = [c.candidate.rank for c in CELLS if c.tokens == 8 and c.candidate.num_blocks == b]
        ranks = sorted(c.rank for c in seeds if c.num_blocks == b)
        assert len(ranks) == 3
        assert (ranks[0], ranks[-1]) == (min(mine), max(mine))


def test_everything_that_could_be_chosen_is_measured():
    _, kept = pruned(linear)
    assert 0 < len(kept) < len(CELLS)
    costs = LatencyTable("d")
    for cell in CELLS:
        costs.add(cell, measured(linear(cell)))
    full = costs.costs(LAYER)
    faster = {c for c, cost in full.items() if cost < full[DENSE]}
    assert faster <= {cell.candidate for cell in kept}
    slow = {c for c, cost in full.items() if cost > 1.2 * full[DENSE]}
    assert not slow & {cell.candidate for cell in kept}


def test_a_candidate_that_a_richer_one_beats_is_left_out():
    # b = 4 is so fast here that b = 1 and 2, its special cases at equal rank, cannot be chosen.
    time = {0: 1.0, 1: 0.9, 2: 0.8, 4: 0.3, 8: 0.85}
    _, kept = pruned(lambda cell: time[cell.candidate.num_blocks])
    blocks = {cell.candidate.num_blocks for cell in kept}
    assert 4 in blocks
    assert 8 in blocks  # not a special case of b = 4
    top = max(c.candidate.rank for c in CELLS if c.candidate.num_blocks == 4)
    assert all(c.candidate.rank > top for c in kept if c.candidate.num_blocks in (1, 2))


@pytest.mark.parametrize("failed", [False, True])
def test_a_candidate_is_judged_by_all_its_calls(failed):
    # Slower than dense at 8 tokens, much faster at 64: it pays in the weighted sum.
    def time(cell) -> float:
        return 1.0 if cell.candidate.is_dense else 1.1 if cell.tokens == 8 else 0.2

    table = LatencyTable("d")
    for cell in seed_cells(CELLS):
        broken = failed and cell.candidate.num_blocks == 8 and cell.tokens == 64
        table.add(cell, None if broken else measured(time(cell)))
    kept = promising_cells([LAYER], CELLS, table)
    assert {c.tokens for c in kept if c.candidate.num_blocks == 4} == {8, 64}
    if failed:  # no prediction at 64 tokens: its candidates have no cost of all calls
        assert not [c for c in kept if c.candidate.num_blocks == 8 and c.tokens == 64]


def test_a_resumed_run_wants_the_same_cells():
    def bent(cell) -> float:  # in between, nothing like the straight lines that the seeds predict
        return 1.0 if cell.candidate.is_dense else 0.3 + 0.6 * (cell.candidate.rank % 3)

    table, kept = pruned(bent)
    for cell in kept[: len(kept) // 2]:
        table.add(cell, measured(bent(cell)))
    assert promising_cells([LAYER], CELLS, table) == kept


def test_a_dense_cell_that_failed_prunes_nothing_and_is_left_to_the_profiler():
    table = LatencyTable("d")
    for cell in seed_cells(CELLS):
        table.add(cell, None if cell.candidate.is_dense else measured(linear(cell)))
    assert promising_cells([LAYER], CELLS, table)
