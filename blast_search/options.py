"""What the verbs of the command line share: options, progress, JSON output."""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from blast_search import stopping
from blast_search.progress import Reporter

TaskOption = Annotated[
    str,
    typer.Option(help="Built-in task, pkg.module:function, hf:FOLDER?text=FILE or shapes:NAME."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
SpaceOption = Annotated[str, typer.Option(help="Search space: a shipped name or a YAML file.")]
WorkloadOption = Annotated[
    str | None, typer.Option(help="[NAME:]BATCHxLENGTH[@WEIGHT],... instead of the task's own.")
]
EveryOption = Annotated[
    bool, typer.Option("--every-workload", help="The budget holds on each, not only on their sum.")
]
ModeOption = Annotated[
    str, typer.Option(help="Timed calls: eager, compiled, cuda-graph; -cold: flushed.")
]
ProfileOption = Annotated[
    str, typer.Option("--profile", help="full, or pruned: only cells that could be chosen.")
]
WorkersOption = Annotated[str, typer.Option(help="auto, ray or local.")]
AddressOption = Annotated[str | None, typer.Option(help="Address of a Ray cluster.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, else nothing.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Only results, no progress.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="More detail; tracebacks.")]
BudgetOption = Annotated[float | None, typer.Option(help="Share of dense latency left, 0.3.")]
TrialsOption = Annotated[int, typer.Option(help="Optuna trials.")]
StepsOption = Annotated[
    int | None, typer.Option(help="Default: the task's recipe; 0: no retraining.")
]
OutOption = Annotated[Path | None, typer.Option(help="Run folder (default: results/<run>).")]
ResumeOption = Annotated[Path | None, typer.Option(help="Continue the run in this folder.")]
PlanTaskOption = Annotated[
    str | None, typer.Option(help="Default: the plan's own task; beside --model, none.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="pkg.module:function that returns the dense model; only a --task beside it "
        "gives calibration data."
    ),
]
SeedOption = Annotated[int, typer.Option(help="Seed of all random choices.")]


def given(context: typer.Context) -> dict[str, Any]:
    """The options that stand on the command line."""
    return {
        name: value
        for name, value in context.params.items()
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }


def reporter(quiet: bool, verbose: bool = False) -> Reporter:
    return Reporter(0 if quiet else 2 if verbose else 1, stopping.check)


def emit(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout; what is no finite number is null."""
    typer.echo(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """What a task or a model prints meanwhile, in whatever language, goes to stderr."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()  # what those printed that had kept it
        ctypes.CDLL(None).fflush(None)  # and what C code did
        os.dup2(saved, 1)
        os.close(saved)
