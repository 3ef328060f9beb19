"""The command line: arguments in, artefacts out; the only place where errors become exit codes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from blast_search import errors, measure_verbs, model_verbs
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
    emit,
    given,
    reporter,
)

app = typer.Typer(
    name="blast-search",
    help="Make PyTorch models faster with BLAST matrices, chosen per layer by measured latency.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.UsageError, 2),
    (errors.InfeasibleBudgetError, 3),
    (errors.IncompatibleInputError, 4),
    (errors.RunLockedError, 5),
    (errors.BlastSearchError, 1),
    (OSError, 1),
)


@app.command()
def search(
    context: typer.Context,
    budget: BudgetOption = None,
    budget_scope: Annotated[str, typer.Option(help="layers, model, macs or params.")] = "layers",
    max_drop: Annotated[
        float | None, typer.Option(help="Largest fall of the metric after retraining.")
    ] = None,
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
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL (default: study.db in the run folder).")
    ] = None,
    trials: TrialsOption = 20,
    time_limit: Annotated[
        float | None, typer.Option(help="Minutes for the whole run; half of it for the search.")
    ] = None,
    retrain_steps: StepsOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    seed: SeedOption = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only a forecast of cost.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="YAML with these options; flags override it.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Search, apply, retrain and verify: the whole pipeline."""
    from blast_search import commands

    options = {k: v for k, v in context.params.items() if k not in commands.NOT_SETTINGS}
    result = commands.search(
        options, given(context), config, resume, dry_run, reporter(quiet, verbose),
        quiet or as_json,
    )  # fmt: skip
    if as_json:
        emit(result)


app.command()(measure_verbs.profile)


@app.command()
def pareto(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    at: Annotated[float | None, typer.Option(help="Another budget: writes its plan.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where --at writes the plan.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the front as a PNG.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="The front as CSV on stdout.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The front as a table; --at picks another plan from what is on file."""
    from blast_search import front

    result = front.pareto(run, at, out, plot, "json" if as_json else "csv" if csv else "table")
    if as_json:
        emit(result)


for verb in (
    model_verbs.apply, model_verbs.retrain, model_verbs.refresh, model_verbs.verify,
    measure_verbs.compare,
):  # fmt: skip
    app.command()(verb)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    price_per_hour: Annotated[float, typer.Option(help="Price of the device per hour.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Write report.html, report.md and front.png of a run again."""
    from blast_search.front import existing_run
    from blast_search.report import write_report

    write_report(existing_run(run), price_per_hour)
    if as_json:
        emit({"report": str(run / "report.html")})
    else:
        typer.echo(f"{run / 'report.html'}")


@app.command()
def tasks(as_json: JsonOption = False) -> None:
    """List the built-in tasks."""
    from blast_search.tasks import BUILTIN

    if as_json:
        emit({"tasks": BUILTIN})
        return
    for name, text in BUILTIN.items():
        typer.echo(f"{name:<10} {text}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Device, versions, kernels, and the timing noise of this machine."""
    from blast_search import commands

    result = commands.doctor(as_json)
    if as_json:
        emit(result)


class Stopped(BaseException):
    """SIGINT or SIGTERM.  Not KeyboardInterrupt: the libraries between would swallow that."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def _stop(signum: int, frame: Any) -> None:
    raise Stopped(signum)


def run_guarded(command: Callable[[], Any], verbose: bool = False) -> int:
    """Run a command and turn every error into a message and an exit code."""
    try:
        command()
    except Stopped as stop:
        typer.echo(
            "\nStopped. What was measured is on file: continue with --resume RUN.", err=True
        )
        return stop.exit_code
    except tuple(kind for kind, _ in EXIT_CODES) as error:
        typer.echo(f"error: {error}", err=True)
        return next(code for kind, code in EXIT_CODES if isinstance(error, kind))
    except Exception as error:  # ours, or that of a task's own code
        if verbose:
            traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        typer.echo(
            f"error: {type(error).__name__}: {error} ({place.filename}, line {place.lineno}). "
            "With -v the whole traceback is shown; what was measured is on file.",
            err=True,
        )
        return 1
    return 0


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Our own warnings as one plain line; others with the place they come from."""
    if issubclass(category, errors.SingularGramWarning):
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def main(arguments: list[str] | None = None) -> None:
    """Entry point; `blast-search --budget 0.3` means `blast-search search --budget 0.3`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("--help", "--version"):
        arguments.insert(0, "search")
    if arguments == ["--version"]:
        from blast_search import __version__

        typer.echo(__version__)
        return
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.formatwarning = _format_warning
    verbose = bool({"-v", "--verbose"} & set(arguments))
    sys.exit(run_guarded(lambda: app(arguments), verbose))  # usage errors leave by SystemExit(2)


if __name__ == "__main__":
    main()
