"""The Ray Tune side of profiling: a class trainable, and the callback that records its results.

A module of its own, because Tune pickles both by reference; the driver's open files stay in
`ON_RESULT`, which is never pickled.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.error import TuneError
from ray.tune.experiment import Trial

from blast_search.cluster import RESOURCE, Places, describe_as
from blast_search.errors import BlastSearchError
from blast_search.latency import fingerprint, synchronizer
from blast_search.modes import float32_products
from blast_search.tables import Cell, Measurement
from blast_search.workers import Measure, OnResult, attempt

ON_RESULT: Any = None  # set by the driver before the run
RAISED: list[Exception] = []  # by the driver's part of this run
NODES_SECONDS = 5.0  # between looks at which nodes are alive
MAX_FAILURES = 2  # a cell gets three workers before it counts as failed


class CellTrainable(tune.Trainable):
    """Measures one cell per trial; reused for the next cell without a new process."""

    def setup(self, config: dict[str, Any]) -> None:
        dtype, threads = config["cell"].dtype, config["threads"]
        self.here = describe_as(config["device_type"], dtype, threads, config["float32"])
        self.job = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.job = new_config
        return True

    def step(self) -> dict[str, Any]:
        cell, device_type = self.job["cell"], self.job["device_type"]
        # Raises in a process whose device the last cell broke: Tune tries again in a new one.
        synchronizer(torch.device(device_type))()
        if fingerprint(self.here) != cell.device:
            return {"other_device": self.here["device"], "done": True}
        measured, status = attempt(self.job["measure"], cell, device_type)
        return {"measured": measured and vars(measured), "status": status, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


class Record(Callback):
    """Hands every finished or failed trial to the driver's `ON_RESULT` as it arrives.

    Stops the run when none of its nodes is left: Tune would wait for ever.
    """

    def __init__(self, nodes: tuple[str, ...]) -> None:
        self.nodes, self.checked = set(nodes), time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if time.monotonic() - self.checked < NODES_SECONDS:
            return
        self.checked = time.monotonic()
        if not any(n["Alive"] and n["NodeID"] in self.nodes for n in ray.nodes()):
            raise BlastSearchError(
                f"all {len(self.nodes)} nodes that measured left the Ray cluster. What was "
                "measured is on file: run again with --resume when they are back."
            )

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: Any, **info: Any
    ) -> None:
        try:
            if other := result.get("other_device"):
                raise BlastSearchError(
                    f"a worker on {result['node_ip']} has {other}, not the device that this run "
                    f"measures. Leave such nodes out with {RESOURCE} (docs/clusters.md)."
                )
            measured = result["measured"]
            ON_RESULT(trial.config["cell"], measured and Measurement(**measured), result["status"])
        except Exception as error:
            RAISED.append(error)  # Tune makes a text of it
            raise

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        ON_RESULT(trial.config["cell"], None, f"failed: the worker died each time{_cause(trial)}")


def _cause(trial: Trial) -> str:
    """The last Python error in Tune's log of the trial's failures, if there is one."""
    text = Path(trial.error_file).read_text() if trial.error_file else ""
    errors = re.findall(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception): .+)$", text, re.M)
    return f" ({errors[-1][:150]})" if errors else ""


def run(
    cells: Sequence[Cell],
    device_type: str,
    on_result: OnResult,
    places: Places,
    measure: Measure,
) -> None:
    """Measure cells as trials of Tune, one whole device each, in an attached Ray."""
    global ON_RESULT
    ON_RESULT = on_result
    RAISED.clear()
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")  # its snapshots are never read
    # Tune logs the traceback of every worker that dies; the table's status column says it shorter.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    device = tune.PlacementGroupFactory(
        [dict(places.resources)],
        bundle_label_selector=[{"ray.io/node-id": f"in({','.join(places.nodes)})"}],
    )
    with tempfile.TemporaryDirectory(prefix="blast-search-tune-") as folder, ExitStack() as stack:
        stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        tuner = Tuner(
            tune.with_resources(CellTrainable, device),
            param_space={
                "cell": tune.grid_search(list(cells)),
                "device_type": device_type,
                "threads": torch.get_num_threads(),
                "float32": float32_products(),
                "measure": measure,
            },
            tune_config=TuneConfig(reuse_actors=True),
            run_config=RunConfig(
                storage_path=folder,
                verbose=0,
                # By default Tune saves each trial's end, which needs a file system that all nodes
                # share; there is nothing to save.
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                callbacks=[Record(places.nodes)],
            ),
        )
        try:
            tuner.fit()
        except TuneError:
            if RAISED:
                raise RAISED[0] from None
            raise
