"""What a run is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

import torch

from blast_search.errors import UsageError

PROFILES = ("full", "pruned")
SCOPES = ("layers", "model", "macs", "params")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's outcome; written to config.yaml."""

    task: str = "minilm"
    budget: float | None = None
    budget_scope: str = "layers"
    max_drop: float | None = None
    space: str = "default"
    workload: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    mode: str = "eager"
    profile: str = "full"
    storage: str | None = None
    trials: int = 20
    time_limit: float | None = None  # minutes
    retrain_steps: int | None = None  # None: the task's recipe; 0: off
    seed: int = 0
    every_workload: bool = False  # the budget holds on each workload, not only on their sum

    def check(self) -> None:
        """Raise UsageError for a value of another type or outside its range."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if not fits and not (whole and isinstance(0.0, kind)):
                raise UsageError(f"{name} is {value!r}, expected {_named(kind)}.")
        if self.budget is None and self.max_drop is None:
            raise UsageError("no budget: give --budget (for instance 0.3), --max-drop, or both.")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise UsageError(
                f"budget is {self.budget:g}, expected a fraction of the dense latency above 0 and "
                "up to 1, for instance 0.3."
            )
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise UsageError(f"max_drop is {self.max_drop:g}, expected a number of 0 or more.")
        if self.budget_scope not in SCOPES:
            raise UsageError(
                f"budget_scope is {self.budget_scope!r}, expected one of {', '.join(SCOPES)}."
            )
        if self.every_workload and self.budget_scope != "layers":
            raise UsageError(
                f"every_workload with budget_scope {self.budget_scope!r}, expected 'layers': a "
                "budget on each workload is one on its layers' latency."
            )
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}.")
        if self.profile not in PROFILES:
            raise UsageError(f"profile is {self.profile!r}, expected {' or '.join(PROFILES)}.")
        if self.trials < 0 or (self.retrain_steps or 0) < 0:
            raise UsageError(
                f"trials is {self.trials}, retrain_steps {self.retrain_steps}, expected 0 or more."
            )
        check_seed(self.seed)
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise UsageError(
                f"time_limit is {self.time_limit:g} minutes, expected a number above 0. Leave it "
                "out for no limit."
            )


def check_seed(seed: int) -> None:
    """Raise UsageError for a seed that numpy or PyTorch would not take."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed is {seed}, expected 0 or more, and less than 2^32.")


def layer_target(budget: float, outside: float) -> float:
    """A budget as a ratio of the searched layers alone.

    Args:
        outside: what the dense model spends outside the searched layers, as a share of its whole
            cost in the unit of the budget's scope (time, multiply-adds, parameters).
    """
    return (budget - outside) / (1 - outside)


SETTING_NAMES = {f.name for f in fields(Settings)}


def _named(kind: Any) -> str:
    """A type in words: float | None is "a number or nothing"."""
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    parts = [words.get(part, "nothing") for part in get_args(kind) or (kind,)]
    return " or ".join(parts)


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device is {name!r}, expected auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device is cuda, but PyTorch sees no CUDA device. Use --device cpu.")
    use_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")
