"""Progress on stderr: bars with remaining time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[], None]


class Reporter:
    """Tells what the run is doing.

    Args:
        level: 0 silent, 1 normal, 2 verbose.
        check: called after every step of a stage; what it raises ends the run.
    """

    def __init__(self, level: int = 1, check: Callable[[], None] = lambda: None) -> None:
        self.level, self.check = level, check
        self.console = Console(stderr=True, highlight=False, quiet=level == 0)
        self.run: Path | None = None  # the run folder, once it is open

    def opened(self, run: Path) -> None:
        """Tells the run folder, which errors name from now on."""
        self.run = run
        self.say(f"run folder: {run}")

    def say(self, message: str) -> None:
        self.console.print(message, soft_wrap=True, markup=False)

    def detail(self, message: str) -> None:
        if self.level > 1:
            self.say(message)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Count `total` steps: call the yielded function after each."""
        started = time.monotonic()
        if self.console.is_terminal and self.level:
            columns = (
                TextColumn("{task.description:<34}"), BarColumn(24), MofNCompleteColumn(),
                TimeRemainingColumn(),
            )  # fmt: skip
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(name, total=total)
                yield self._checked(lambda: bar.advance(task))
        else:
            yield self._checked(self._lines(name, total, started))
        self.say(f"{name:<34} done in {time.monotonic() - started:.1f} s")

    def _checked(self, advance: Advance) -> Advance:
        def step() -> None:
            advance()
            self.check()

        return step

    def _lines(self, name: str, total: int, started: float) -> Advance:
        """One line at every tenth of the stage, at most one in five seconds."""
        state = {"done": 0, "last": started}

        def advance() -> None:
            state["done"] += 1
            now, done = time.monotonic(), state["done"]
            tenth = int(done * 10 / total) > int((done - 1) * 10 / total) if total else False
            if tenth and done < total and now - state["last"] >= 5:
                state["last"] = now
                remaining = (now - started) / done * (total - done)
                self.say(f"{name:<34} {done:.0f}/{total}, {remaining:.0f} s left")

        return advance


SILENT = Reporter(0)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the program here; the command line decides (cli.py)."""
        raise


def console() -> Console:
    """Tables on stdout: as wide as the terminal, 110 columns where there is none."""
    return _Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 110)
