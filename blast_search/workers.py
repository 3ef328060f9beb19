"""Who measures: this process, or Ray Tune workers that each have a whole device to themselves.

Finished cells reach the driver's callback one by one and are appended to the latency table
there.  Resuming means measuring the grid minus the cells on file; Tune's own restore is not used
(its snapshots are up to ten seconds old, and they are pickles).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import torch

from blast_search.errors import BlastSearchError, MissingDependencyError, UsageError
from blast_search.latency import measure_cell
from blast_search.tables import Cell, Measurement

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


def measure_cells(
    cells: Sequence[Cell],
    device_type: str,
    on_result: OnResult,
    workers: str = "auto",
    ray_address: str | None = None,
) -> None:
    """Measure cells and hand each result to `on_result` as it arrives.

    A cell that always fails (out of memory, kernel error) is reported as failed and stops
    nothing.
    """
    if not cells:
        return
    if resolve(workers) == "ray":
        with _ray(ray_address):
            _tune(cells, device_type, on_result)
        return
    for cell in cells:
        try:
            on_result(cell, measure_cell(cell, device_type), "ok")
        except RuntimeError as error:  # torch reports kernel and memory errors as RuntimeError
            on_result(cell, None, _short(error))


def _short(error: object) -> str:
    return "failed: " + " ".join(str(error).split())[:200]


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """The cluster of --ray-address or RAY_ADDRESS, one that is attached, or a local Ray."""
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        _probe(address)
        options["address"] = address
    else:
        # A new Ray of our own, even if RAY_ADDRESS-less cluster files lie around.
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
            "num_cpus": os.cpu_count(),
        }
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Ray itself tries an address where nothing listens for two minutes; we try two seconds."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto": Ray finds the cluster, or says at once that there is none
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError as error:
        raise BlastSearchError(
            f"no Ray cluster answers at {address} ({error}). Start one with `ray start --head`, "
            "correct --ray-address / RAY_ADDRESS, or use --workers local."
        ) from None


def _tune(cells: Sequence[Cell], device_type: str, on_result: OnResult) -> None:
    import ray
    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner

    from blast_search import trainable

    # The whole device: a share of a GPU, or some of the cores, would let trials time each other.
    cores = min(int(n["Resources"].get("CPU", 1)) for n in ray.nodes() if n["Alive"])
    resources = {"CPU": 1, "GPU": 1} if device_type == "cuda" else {"CPU": max(1, cores)}
    threads = torch.get_num_threads()
    trainable.ON_RESULT = on_result
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    with tempfile.TemporaryDirectory(prefix="blast-search-tune-") as folder, ExitStack() as stack:
        stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        Tuner(
            tune.with_resources(trainable.CellTrainable, resources),
            param_space={
                "index": tune.grid_search(list(range(len(cells)))),
                "cells": tuple(cells),
                "device_type": device_type,
                "threads": threads,
            },
            tune_config=TuneConfig(reuse_actors=True),
            run_config=RunConfig(
                storage_path=folder,
                verbose=0,
                failure_config=FailureConfig(max_failures=2),
                callbacks=[trainable.Record()],
            ),
        ).fit()
