"""Who measures: this process, or Ray Tune workers that each have a whole device to themselves.

Finished cells reach the driver's callback one by one and are appended to the latency table
there.  Resuming means measuring the grid minus the cells on file; Tune's own restore is not used
(its snapshots are up to ten seconds old, and they are pickles).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch

from blast_search.errors import (
    BlastSearchError,
    MissingDependencyError,
    UsageError,
    in_one_line,
)
from blast_search.latency import measure_cell, synchronizer
from blast_search.tables import Cell, Measurement

Measure = Callable[[Cell, str], Measurement]
OnResult = Callable[[Cell, Measurement | None, str], None]
MODES = ("auto", "ray", "local")


def resolve(workers: str) -> str:
    """ "auto" is Ray where it is installed.

    Raises:
        UsageError: an unknown mode. MissingDependencyError: "ray" without Ray.
    """
    if workers not in MODES:
        raise UsageError(f"workers is {workers!r}, expected one of {', '.join(MODES)}.")
    installed = importlib.util.find_spec("ray") is not None
    if workers == "ray" and not installed:
        raise MissingDependencyError(
            "--workers ray needs Ray: pip install 'ray[tune]' (or use --workers local)."
        )
    return "ray" if workers != "local" and installed else "local"


def check_workers(workers: str, ray_address: str | None) -> None:
    """Raise what `resolve` does, and UsageError for an address that nobody would use."""
    if resolve(workers) == "local" and ray_address:
        raise UsageError(
            f"--ray-address {ray_address} without Ray: workers is {workers!r}. Leave one of them "
            "out, or use --workers ray."
        )


def measure_cells(
    cells: Sequence[Cell],
    device_type: str,
    on_result: OnResult,
    workers: str = "auto",
    ray_address: str | None = None,
    measure: Measure = measure_cell,
    say: Callable[[str], None] = lambda message: None,
) -> None:
    """Measure cells of one device and hand each result to `on_result` as it arrives.

    A cell that always fails (out of memory, kernel error, death of its worker each time) is
    reported as failed and stops nothing.

    Args:
        measure: times one cell, in a worker.
        say: receives a line where nodes of the cluster are left out.

    Raises:
        BlastSearchError: no Ray cluster answers, no node of it is this kind of device, or the
            device stopped working.
    """
    if not cells:
        return
    if resolve(workers) == "ray":
        from blast_search import cluster, trainable

        if device_type == "cuda":
            torch.cuda.empty_cache()  # workers share the device with this process
        with cluster.attached(ray_address):
            places = cluster.places(cells[0].device, cells[0].dtype, device_type, say)
            trainable.run(cells, device_type, on_result, places, measure)
        return
    for cell in cells:
        measured, status = attempt(measure, cell, device_type)
        on_result(cell, measured, status)
        if measured is None:
            _still_works(cell, device_type)


def attempt(measure: Measure, cell: Cell, device_type: str) -> tuple[Measurement | None, str]:
    """A cell's measurement and "ok", or None and why it failed.

    Every Exception counts: compilers and drivers have errors of their own beside PyTorch's
    RuntimeError.
    """
    try:
        return measure(cell, device_type), "ok"
    except Exception as error:
        return None, f"failed: {in_one_line(error)[:200]}"


def _still_works(cell: Cell, device_type: str) -> None:
    """After some kernel errors, every later call of a process fails: do not blame other cells."""
    try:
        synchronizer(torch.device(device_type))()
    except RuntimeError as error:
        raise BlastSearchError(
            f"the device stopped working in this process after candidate {cell.candidate.key} of "
            f"{cell.out_features} x {cell.in_features} ({str(error).splitlines()[0]}). That cell "
            "is on file as failed: run again with --resume, or use --workers ray."
        ) from error
