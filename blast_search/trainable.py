"""The Ray Tune side of profiling: a class trainable, and the callback that records its results.

A module of its own, because Tune pickles both by reference; the driver's open files stay in
`ON_RESULT`, which is never pickled.
"""

from __future__ import annotations

from typing import Any

import torch
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial

from blast_search.latency import measure_cell
from blast_search.tables import Cell, Measurement

ON_RESULT: Any = None  # set by the driver before the run


class CellTrainable(tune.Trainable):
    """Measures one cell per trial; reused for the next cell without a new process."""

    def setup(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(config["threads"])
        self.cell_config = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cell_config = new_config
        return True

    def step(self) -> dict[str, Any]:
        cell: Cell = self.cell_config["cells"][self.cell_config["index"]]
        try:
            measured = vars(measure_cell(cell, self.cell_config["device_type"]))
        except RuntimeError as error:  # a kernel or memory error would only repeat itself
            measured = {"failed": " ".join(str(error).split())[:200]}
        return {"measured": measured, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        return None

    def load_checkpoint(self, checkpoint: Any) -> None:
        return None


class Record(Callback):
    """Hands every finished or failed trial to the driver's `ON_RESULT` as it arrives."""

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: Any, **info: Any
    ) -> None:
        measured = result["measured"]
        if "failed" in measured:
            ON_RESULT(_cell(trial), None, f"failed: {measured['failed']}")
        else:
            ON_RESULT(_cell(trial), Measurement(**measured), "ok")

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        ON_RESULT(_cell(trial), None, "failed: the worker died each time")


def _cell(trial: Trial) -> Cell:
    cell: Cell = trial.config["cells"][trial.config["index"]]
    return cell
