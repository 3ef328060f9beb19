"""The verbs of the command line that measure without leaving a model: profile and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blast_search.errors import UsageError
from blast_search.options import (
    AddressOption,
    BudgetOption,
    DeviceOption,
    DtypeOption,
    EveryOption,
    JsonOption,
    ModeOption,
    OutOption,
    ProfileOption,
    QuietOption,
    ResumeOption,
    SeedOption,
    SpaceOption,
    StepsOption,
    TaskOption,
    TrialsOption,
    VerboseOption,
    WorkersOption,
    WorkloadOption,
    given,
    reporter,
)


def profile(
    context: typer.Context,
    task: TaskOption = "minilm",
    space: SpaceOption = "default",
    workload: WorkloadOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    mode: ModeOption = "eager",
    profile: ProfileOption = "full",
    check: Annotated[
        bool, typer.Option("--check", help="Time random plans: predicted against measured.")
    ] = False,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Instead of a task, a published architecture: llama-7b, llama-3-8b, "
            "gpt2, vit-l, dit-xl."
        ),
    ] = None,
    workers: WorkersOption = "auto",
    ray_address: AddressOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for latency.csv.")] = None,
    seed: SeedOption = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only a forecast of cost.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> dict[str, Any] | None:
    """Measure only the latency table of a model on this device."""
    from blast_search import commands
    from blast_search.settings import Settings
    from blast_search.tasks import SHAPES

    if shapes:
        if "task" in given(context):
            raise UsageError("--task and --shapes exclude each other: leave one out.")
        task = SHAPES + shapes
    result = commands.profile(
        Settings(task=task, budget=1.0, space=space, workload=workload, device=device,
                 dtype=dtype, mode=mode, profile=profile, seed=seed),
        workers, ray_address, out, check, dry_run, reporter(quiet, verbose), as_json,
    )  # fmt: skip
    return result if as_json else None


def compare(
    context: typer.Context,
    budget: BudgetOption = None,
    seeds: Annotated[int, typer.Option(help="Retrainings of every contender.")] = 3,
    task: TaskOption = "minilm",
    space: SpaceOption = "default",
    workload: WorkloadOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    mode: ModeOption = "eager",
    profile: ProfileOption = "full",
    every_workload: EveryOption = False,
    workers: WorkersOption = "auto",
    ray_address: AddressOption = None,
    trials: TrialsOption = 20,
    retrain_steps: StepsOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> dict[str, Any] | None:
    """The search beside uniform plans of every structure, at equal measured latency."""
    from blast_search import commands

    options = {k: v for k, v in context.params.items() if k not in commands.NOT_ARGUMENTS}
    result = commands.compare(options, given(context), resume, reporter(quiet, verbose), as_json)
    return result if as_json else None
