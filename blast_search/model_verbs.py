"""The verbs of the command line that take a plan or the folder of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blast_search.options import (
    JsonOption,
    ModelOption,
    PlanTaskOption,
    QuietOption,
    SeedOption,
    VerboseOption,
    reporter,
)


def apply(
    plan: Annotated[Path, typer.Argument(help="plan.json, or a folder that holds one.")],
    out: Annotated[Path, typer.Option(help="Folder for the compressed model.")],
    task: PlanTaskOption = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> dict[str, Any] | None:
    """Build the compressed model of a plan."""
    from blast_search import saved

    result = saved.apply(plan, out, task, model, reporter(quiet, verbose))
    return result if as_json else None


def retrain(
    folder: Annotated[Path, typer.Argument(help="Folder of an applied model.")],
    task: PlanTaskOption = None,
    steps: Annotated[int | None, typer.Option(help="Default: the task's recipe.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: the same folder.")] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> dict[str, Any] | None:
    """Recover quality of an applied model."""
    from blast_search import saved

    result = saved.retrain(folder, task, steps, out, seed, reporter(quiet, verbose))
    return result if as_json else None


def refresh(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    task: PlanTaskOption = None,
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option(help="Default: the same folder.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> dict[str, Any] | None:
    """Same plan on an updated dense checkpoint, warm-started from the old factors."""
    from blast_search import saved

    result = saved.refresh(folder, task, model, out, reporter(quiet, verbose))
    return result if as_json else None


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    task: PlanTaskOption = None,
    seconds: Annotated[float, typer.Option(help="Seconds of timing.")] = 20.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> dict[str, Any] | None:
    """Measure quality and latency against dense, interleaved in one process."""
    from blast_search import saved

    result = saved.verify(folder, task, seconds, reporter(quiet, verbose), as_json)
    return result if as_json else None
