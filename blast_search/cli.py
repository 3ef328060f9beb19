"""The command line: arguments in, artefacts out; the only place where errors become exit codes."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
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
    stdout_on_stderr,
)
from blast_search.stopping import Stopped, stop_on_signals

PROGRAM = "blast-search"
app = typer.Typer(
    name=PROGRAM,
    help="Make PyTorch models faster with BLAST matrices, chosen per layer by measured latency.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Usage errors are Click's, of which Typer may bring a copy of its own.
CLICK_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
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
        float | None,
        typer.Option(
            help="Minutes to aim at, half of them for the search; profiling and the last timing "
            "are not cut."
        ),
    ] = None,
    retrain_steps: StepsOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    seed: SeedOption = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only a forecast of cost.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML with these options, but for json, quiet, verbose, dry-run and resume; "
            "flags override it."
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> dict[str, Any] | None:
    """Search, apply, retrain and verify: the whole pipeline."""
    from blast_search import commands

    options = {k: v for k, v in context.params.items() if k not in commands.NOT_SETTINGS}
    result = commands.search(
        options, given(context), config, resume, dry_run, reporter(quiet, verbose), as_json
    )
    return result if as_json else None


app.command()(measure_verbs.profile)


@app.command()
def pareto(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    at: Annotated[float | None, typer.Option(help="Another layer budget: its plan.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where --at writes the plan.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the front as a PNG.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="The front as CSV on stdout.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> dict[str, Any] | None:
    """The front as a table; --at picks another plan from what is on file."""
    from blast_search import front

    result = front.pareto(run, at, out, plot, "json" if as_json else "csv" if csv else "table")
    return result if as_json else None


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
    verbose: VerboseOption = False,
) -> dict[str, Any] | None:
    """Write report.html, report.md and front.png of a run again."""
    from blast_search.front import existing_run
    from blast_search.report import write_report

    write_report(existing_run(run), price_per_hour)
    if as_json:
        return {"report": str(run / "report.html")}
    typer.echo(f"{run / 'report.html'}")
    return None


@app.command()
def tasks(as_json: JsonOption = False, verbose: VerboseOption = False) -> dict[str, Any] | None:
    """List the built-in tasks, and how others are named."""
    from blast_search.tasks import BUILTIN, OTHER_FORMS

    if as_json:
        return {"tasks": BUILTIN, "other_forms": OTHER_FORMS}
    for name, text in (BUILTIN | OTHER_FORMS).items():
        typer.echo(f"{name:<20} {text}")
    return None


@app.command()
def doctor(as_json: JsonOption = False, verbose: VerboseOption = False) -> dict[str, Any] | None:
    """Device, versions, kernels, and the timing noise of this machine."""
    from blast_search import commands

    result = commands.doctor(as_json)
    return result if as_json else None


def run_guarded(command: Callable[[], Any], verbose: bool = False, as_json: bool = False) -> int:
    """Run a command and turn every error into a message of one line and an exit code.

    Args:
        command: returns a JSON object, an exit code, or None.
        as_json: that object, or else one with the error, is all there is on stdout.
    """
    try:
        with stdout_on_stderr() if as_json else nullcontext():
            code, value = _outcome(command, verbose)
        if as_json and isinstance(value, dict) and _speaks():
            emit(value)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads stdout has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the last flush would fail, too
        return 128 + signal.SIGPIPE
    return code


def _speaks() -> bool:
    """Whether this process answers on stdout: of those that torchrun started, the first one."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


def _outcome(command: Callable[[], Any], verbose: bool) -> tuple[int, Any]:
    """The exit code of a command, and what it returned or its error as a JSON object."""
    try:
        value = command()
    except Stopped as stop:
        typer.echo(err=True)
        return _told(stop.exit_code, f"Stopped.{_on_file(stop)}", stop, prefix="")
    except CLICK_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a bare `blast-search`
            typer.echo(error.format_message(), err=True)
            return 2, None
        where = error.ctx.command_path if getattr(error, "ctx", None) else PROGRAM
        text = error.format_message().rstrip()
        text += "" if text.endswith((".", "?")) else "."
        return _told(error.exit_code, f"{text} See `{where} --help`.", error)
    except (Exception, SystemExit) as raised:
        meant = _meant(raised)
        if isinstance(meant, BrokenPipeError) and _reader_left():
            raise meant from None
        for kind, code in EXIT_CODES:
            if isinstance(meant, kind):
                return _told(code, str(meant), meant)
        return _told(1, _unexpected(meant, verbose), meant)  # of a task's own code
    return (value, None) if isinstance(value, int) else (0, value)


def _meant(raised: BaseException) -> BaseException:
    """The error itself: Typer takes an EOFError for a user who left a prompt, and a broken pipe,
    whichever it is, for the end."""
    if isinstance(raised, typer.Abort) and raised.__cause__:
        return raised.__cause__
    if isinstance(raised, SystemExit) and isinstance(raised.__context__, BrokenPipeError):
        return raised.__context__
    return raised


def _reader_left() -> bool:
    """Whether nobody reads stdout any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _unexpected(error: BaseException, verbose: bool) -> str:
    """What to say of an error that is nobody's message to a user."""
    if verbose:
        traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    advice = "" if verbose else " With -v the whole traceback is shown."
    notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    return (
        f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno}).{advice}"
        f"{_on_file(error)}{notes}"
    )


def _on_file(error: BaseException) -> str:
    """How to go on with the run that an error ended (commands._naming_the_run)."""
    if not (run := getattr(error, "run", None)):
        return ""
    from blast_search.report import resuming

    return f" What was measured is on file: continue with `{resuming(run)}`."


def _told(
    code: int, message: str, error: BaseException, prefix: str = "error: "
) -> tuple[int, dict[str, Any]]:
    """An error told on stderr, as one line: those of a task's own code may have many."""
    message = " ".join(message.split())
    typer.echo(prefix + message, err=True)
    value = {"error": message, "exit_code": code, **getattr(error, "result", {})}
    run = getattr(error, "run", None)
    return code, value | ({"run": str(run)} if run else {})


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Our own warnings as one plain line; others with the place they come from."""
    if issubclass(category, errors.SingularGramWarning | errors.FallbackWarning):
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
    stop_on_signals()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.formatwarning = _format_warning
    verbose = any(re.fullmatch("--verbose|-q*v[qv]*", text) for text in arguments)
    as_json = "--json" in arguments and "--help" not in arguments
    sys.exit(
        run_guarded(
            lambda: app(arguments, prog_name=PROGRAM, standalone_mode=False), verbose, as_json
        )
    )


if __name__ == "__main__":
    main()
