"""The latency table of a run: from earlier runs on this device, or measured by workers.

profiler = Profiler(prepared, table, workers, address, report)
profiler.run("full")          # or "pruned": only cells that could be chosen
profiler.again(cells)         # longer, where noise could flip the plan
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from blast_search.cellcache import open_cache
from blast_search.errors import IncompatibleInputError
from blast_search.latency import measure_cell, missing_cells
from blast_search.noise import WIDE, gpu_state, gpu_text, table_noise
from blast_search.prepared import Prepared
from blast_search.progress import Reporter
from blast_search.pruning import promising_cells, seed_cells
from blast_search.tables import Cell, LatencyTable, Measurement, cell_row
from blast_search.workers import Measure, OnResult, measure_cells, resolve

AGAIN_SECONDS = 2.0  # per cell at most


@dataclass
class Profiler:
    """Fills `table` with the cells of a prepared task."""

    prepared: Prepared
    table: LatencyTable
    workers: str
    address: str | None
    report: Reporter

    def run(self, profile: str) -> None:
        """Measure the cells that are neither on file nor known from earlier runs.

        Raises:
            IncompatibleInputError: a dense layer cannot be timed.
        """
        cells, table, report = self.prepared.cells(), self.table, self.report
        cache = open_cache(table.device)
        before = gpu_state() if self.prepared.device.type == "cuda" else {}
        if profile == "pruned":
            self._measure(seed_cells(cells), "profile first cells", cache)
            cells = promising_cells(self.prepared.layers, cells, table)
        self._measure(cells, "profile cells", cache)
        if before and (text := gpu_text(before, gpu_state())):
            report.say(text)
        noise = table_noise(table.cells)
        report.say(noise.text) if noise.noisy else report.detail(noise.text)
        failed = sum(value is None for value in table.cells.values())
        if failed:
            report.say(f"{failed} cells could not be measured; their candidates are left out.")
        missing = [c for c in cells if c.candidate.is_dense and table.cells.get(c) is None]
        if missing:
            dense = missing[0]
            raise IncompatibleInputError(
                f"the dense layer {dense.out_features} x {dense.in_features} with {dense.tokens} "
                "tokens could not be timed: see the status column of latency.csv."
            )

    def _measure(self, cells: Sequence[Cell], name: str, cache: LatencyTable) -> None:
        # Only what would be measured: a resumed run must not see more cells than it did before.
        if copied := self.table.merge(cache, missing_cells(self.table, cells)):
            self.report.say(
                f"{copied} cells are known from earlier runs on this device ({cache.path})"
            )
        missing = missing_cells(self.table, cells)
        with self.report.stage(f"{name} ({resolve(self.workers)})", len(missing)) as advance:

            def record(cell: Cell, measured: Measurement | None, status: str) -> None:
                self.table.add(cell, measured, status)
                # What other load blurred is for this run only.
                if measured and measured.uncertainty <= WIDE:
                    cache.add(cell, measured)
                advance()

            self._map(missing, record, measure_cell)

    def again(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Measure cells once more, longer; the rows of the new measurements (tables.FIELDS)."""
        rows: list[dict[str, Any]] = []
        with self.report.stage("profile doubtful cells again", len(cells)) as advance:

            def record(cell: Cell, measured: Measurement | None, status: str) -> None:
                rows.append(cell_row(cell, measured, status))
                advance()

            self._map(cells, record, partial(measure_cell, seconds=AGAIN_SECONDS))
        return rows

    def _map(self, cells: Sequence[Cell], record: OnResult, measure: Measure) -> None:
        device_type = self.prepared.device.type
        measure_cells(
            cells, device_type, record, self.workers, self.address, measure, self.report.say
        )
