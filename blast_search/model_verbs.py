"""The verbs of the command line that take a plan or the folder of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blast_search.options import (
    JsonOption,
    ModelOption,
    PlanTaskOption,
    QuietOption,
    SeedOption,
    emit,
    reporter,
)


def apply(
    plan: Annotated[Path, typer.Argument(help="plan.json, or a folder that holds one.")],
    out: Annotated[Path, typer.Option(help="Folder for the compressed model.")],
    task: PlanTaskOption = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Build the compressed model of a plan."""
    from blast_search import saved

    result = saved.apply(plan, out, task, model, reporter(quiet))
    if as_json:
        emit(result)


def retrain(
    folder: Annotated[Path, typer.Argument(help="Folder of an applied model.")],
    task: PlanTaskOption = None,
    steps: Annotated[int | None, typer.Option(help="Default: the task's recipe.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: the same folder.")] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Recover quality of an applied model."""
    from blast_search import saved

    result = saved.retrain(folder, task, steps, out, seed, reporter(quiet))
    if as_json:
        emit(result)


def refresh(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    task: PlanTaskOption = None,
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option(help="Default: the same folder.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Same plan on an updated dense checkpoint, warm-started from the old factors."""
    from blast_search import saved

    result = saved.refresh(folder, task, model, out, reporter(quiet))
    if as_json:
        emit(result)


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    task: PlanTaskOption = None,
    seconds: Annotated[float, typer.Option(help="Seconds of timing.")] = 20.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure quality and latency against dense, interleaved in one process."""
    from blast_search import saved

    result = saved.verify(folder, task, seconds, reporter(quiet), quiet or as_json)
    if as_json:
        emit(result)
