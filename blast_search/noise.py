"""How far a timing can be trusted: intervals, other load on the device, a verdict on a table.

The verdict rests on the timings themselves (their intervals, and the drift of the dense twins);
the load of other programs is read beside them, as the likely cause.
"""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from blast_search.tables import Cell, Measurement, Place

NARROW = 0.01  # half-width of a ratio's interval, relative: enough repeats
WIDE = 0.03  # beyond this a cell is noisy
NOISY_CELLS = 0.1  # share of noisy cells that makes a table noisy
DRIFT = 0.15  # spread of one shape's dense twins (p90 - p10 over median) that does
CLOCK = 0.1  # a change of the GPU's clock worth a word; idle clocks are lower, so it is no verdict
BUSY = 0.05  # share of the processors taken by other programs worth a word


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """A 95 % confidence interval of the median from order statistics (no assumed distribution).

    The number of samples below the median is binomial(n, 1/2); normal approximation.
    """
    ordered = np.sort(values)
    n = len(ordered)
    half = 0.98 * math.sqrt(n)
    low = max(0, math.floor((n - 1) / 2 - half))
    high = min(n - 1, math.ceil((n - 1) / 2 + half))
    return float(ordered[low]), float(ordered[high])


def half_width(interval: tuple[float, float]) -> float:
    """Half the width of an interval relative to its middle."""
    low, high = interval
    return (high - low) / (high + low)


class OtherLoad:
    """What other programs take of the processors between two readings (Linux; else nothing).

    Inside a container the kernel's counters may be those of the whole host: a hint, no verdict.
    """

    def __init__(self) -> None:
        self.began = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: all programs' work on our processors, our own, the clock."""
        busy = 0.0
        try:
            tick = os.sysconf("SC_CLK_TCK")
            ours = os.sched_getaffinity(0)
            for line in Path("/proc/stat").read_text().splitlines():
                name, *fields = line.split()
                if name[:3] == "cpu" and name[3:].isdecimal() and int(name[3:]) in ours:
                    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
                    busy += (user + nice + system + irq + softirq + steal) / tick
        except (OSError, ValueError, AttributeError):
            busy = 0.0
        return busy, time.process_time(), time.monotonic()

    def share(self) -> float:
        """Share of our processors' time taken by others since the start, 0 to 1."""
        busy, own, clock = (now - then for now, then in zip(self._read(), self.began, strict=True))
        capacity = clock * processors()
        return min(1.0, max(0.0, busy - own) / capacity) if capacity > 0 else 0.0


def processors() -> int:
    """How many processors this process may run on (its affinity)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu_state() -> dict[str, Any]:
    """Processes and clocks of the GPUs as nvidia-smi tells them; empty where it does not.

    Returns:
        {"processes": other programs that compute on a GPU, "sm_clock_mhz": [...]}.
    """

    def query(what: str) -> list[str]:
        command = ["nvidia-smi", f"--query-{what}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return [line.strip() for line in done.stdout.splitlines() if line.strip()]

    try:
        processes = {int(pid) for pid in query("compute-apps=pid")} - {os.getpid()}
        clocks = [float(clock) for clock in query("gpu=clocks.sm")]
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return {"processes": len(processes), "sm_clock_mhz": clocks}


def gpu_text(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What disturbed a GPU between two states, in a sentence; "" if nothing did."""
    found = []
    others = before.get("processes", 0)  # afterwards our own workers may still be there
    if others:
        found.append(f"{others} other programs compute on the GPU")
    for old, new in zip(
        before.get("sm_clock_mhz", ()), after.get("sm_clock_mhz", ()), strict=False
    ):
        if old and abs(new / old - 1) > CLOCK:
            found.append(f"a GPU's clock went from {old:.0f} to {new:.0f} MHz")
    return f"While cells were timed, {'; '.join(found)}." if found else ""


@dataclass(frozen=True)
class Noise:
    """The steadiness of a latency table.

    `drift` is the worst spread of one shape's dense twins over the run: (p90 - p10) / median.
    """

    cells: int
    noisy_cells: int
    median_half_width: float
    drift: float
    other_load: float  # the largest share of the processors that others took during a cell

    @property
    def noisy(self) -> bool:
        return self.noisy_cells > NOISY_CELLS * self.cells or self.drift > DRIFT

    @property
    def text(self) -> str:
        """One sentence for a user."""
        facts = (
            f"{self.noisy_cells} of {self.cells} cells have a ratio uncertain by more than "
            f"{WIDE:.0%} (median {self.median_half_width:.1%}), dense layers drifted by "
            f"{self.drift:.0%}"
        )
        if not self.noisy:
            return f"Steady timings: {facts}."
        cause = (
            f"Other programs took up to {self.other_load:.0%} of the processors: stop them"
            if self.other_load > BUSY
            else "Find what else uses the device, or fix its clocks"
        )
        return f"Noisy timings: {facts}. {cause}, and profile again."


def table_noise(cells: Mapping[Cell, Measurement | None]) -> Noise:
    """Judge a latency table by its intervals and by the drift of its dense twins."""
    measured = {cell: m for cell, m in cells.items() if m}
    widths = [m.uncertainty for m in measured.values()]
    twins: dict[Place, list[float]] = defaultdict(list)
    for cell, m in measured.items():
        twins[cell.place].append(m.dense_us)
    drifts = [
        (float(np.percentile(values, 90)) - float(np.percentile(values, 10))) / median(values)
        for values in twins.values()
        if len(values) >= 5
    ]
    return Noise(
        len(measured),
        sum(width > WIDE for width in widths),
        median(widths) if widths else 0.0,
        max(drifts, default=0.0),
        max((m.other_load for m in measured.values()), default=0.0),
    )
