"""The errors a user can cause.  Every message says: got, expected, next step.

The library raises them; only the command line turns them into exit codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class BlastSearchError(Exception):
    """Base of all errors that a user can act on."""


class UsageError(BlastSearchError):
    """A wrong argument: unknown task, budget outside (0, 1], no such run folder (exit code 2)."""


class MissingDependencyError(BlastSearchError):
    """An optional package or file is not installed; the message holds the command (exit 1)."""


class InfeasibleBudgetError(BlastSearchError):
    """No plan meets the budgets (exit code 3); the message names the smallest reachable one.

    `nearest`: the plan that comes nearest, of who has it.  `result`: what was found all the same,
    for the JSON object of the command line.
    """

    nearest: Any = None
    result: Mapping[str, Any] = {}


class IncompatibleInputError(BlastSearchError):
    """A missing or corrupt file, or a model, plan or table that does not fit (exit code 4).

    Missing are a plan, a saved model or a file inside a run folder; of a search space, a
    configuration or a run folder that is not there it is a UsageError.
    """


class RunLockedError(BlastSearchError):
    """Another process is using the run folder (exit code 5)."""


def in_one_line(error: BaseException) -> str:
    """An error's kind and message; those of compilers and of a task's own code have many lines."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class SingularGramWarning(UserWarning):
    """A layer's Gram is singular in float32: too few calibration tokens, or dead inputs."""


class FallbackWarning(UserWarning):
    """Layers that cannot take the block count asked for, and what they get instead."""
