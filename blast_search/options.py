"""Options that several verbs of the command line share."""

from __future__ import annotations

from typing import Annotated

import typer

TaskOption = Annotated[str, typer.Option(help="Built-in task, or pkg.module:function.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
SpaceOption = Annotated[str, typer.Option(help="Search space: a shipped name or a YAML file.")]
WorkloadOption = Annotated[
    str | None, typer.Option(help="[NAME:]BATCHxLENGTH[@WEIGHT],... instead of the task's own.")
]
WorkersOption = Annotated[str, typer.Option(help="auto, ray or local.")]
AddressOption = Annotated[str | None, typer.Option(help="Address of a Ray cluster.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="More detail.")]
PlanTaskOption = Annotated[str | None, typer.Option(help="Default: the plan's own task.")]
ModelOption = Annotated[
    str | None, typer.Option(help="pkg.module:function that returns the dense model.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of all random choices.")]
