"""Built-in tasks, and the way to name a task: a model, its data and its quality metric."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from blast_search.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from blast_search.evaluate import Task

BUILTIN: dict[str, str] = {
    "minilm": "sentence encoder MiniLM-L6 (36 Linear layers): find the word for a definition, MRR",
    "smollm2": "language model SmolLM2-135M (210 Linear layers): Wikipedia text, perplexity",
    "vit": "small vision transformer trained here on Fashion-MNIST: accuracy",
}
SHAPES = "shapes:"  # a published architecture without its weights
OTHER_FORMS: dict[str, str] = {
    "pkg.module:function": "a task of your own: what the function returns",
    "hf:FOLDER?text=FILE": "a Hugging Face text model, and a text (or ?dataset=NAME, or neither)",
    "shapes:NAME": "a published architecture, random weights, for latency (profile --shapes)",
}
_METHODS = ("model", "workload", "calibration", "evaluate", "train_batches", "loss")
_FORMS = (
    f"Expected one of {', '.join(BUILTIN)}, or pkg.module:function (a function that returns a "
    "task), or hf:FOLDER?text=FILE, or hf:FOLDER?dataset=NAME, or shapes:NAME."
)


def load_task(spec: str) -> Task:
    """The task that `spec` names: built-in, pkg.module:function, hf:FOLDER?text=FILE, shapes:NAME.

    A module is looked up in the current folder first.  hf:FOLDER?dataset=NAME_OR_FOLDER takes its
    text from a Hugging Face dataset (see HFTask), and hf:FOLDER the Wikipedia text shipped here.

    Raises:
        UsageError: unknown name, a function that cannot be imported, or that returns no task.
        MissingDependencyError: the task needs a package or file that is not here.
    """
    if spec in BUILTIN:
        task: Task = importlib.import_module(f"blast_search.tasks.{spec}").task()
        return task
    if spec.startswith("hf:"):
        return _load_hf(spec)
    if spec.startswith(SHAPES):
        from blast_search.tasks.shapes import ShapesTask

        return ShapesTask(spec.removeprefix(SHAPES))
    module_name, colon, function_name = spec.partition(":")
    if not colon or not module_name or not function_name:
        raise UsageError(f"unknown task {spec!r}. {_FORMS} Run `blast-search tasks` for a list.")
    refuse_path("the task", spec)
    return check_task(spec, _call(spec, module_name, function_name))


def names_no_task(spec: str) -> bool:
    """Whether `load_task` knows no such form, as of the name of a task object."""
    return spec not in BUILTIN and ":" not in spec


def refuse_path(what: str, spec: str) -> None:
    """Refuse a file's path where a module's name belongs: Python's own errors do not say that.

    Args:
        what: the message begins with it.
        spec: should be pkg.module:function.

    Raises:
        UsageError: it is a path; the message says which name to give.
    """
    module, _, function = spec.partition(":")
    if not (module.endswith(".py") or "/" in module or module.startswith(".")):
        return
    path = Path(module.removesuffix(".py"))
    elsewhere = path.is_absolute() or ".." in path.parts
    name = path.name if elsewhere else ".".join(path.parts).strip(".")
    where = f", and call it from the folder {path.parent}" if elsewhere else ""
    raise UsageError(
        f"{what} {spec!r} is the path of a file, expected a module's name. "
        f"Give {name}:{function or 'FUNCTION'}{where}."
    )


def _load_hf(spec: str) -> Task:
    source, _, query = spec.removeprefix("hf:").partition("?")
    # parse_qs reads a plus as a space, which no name of a file means by it.
    options = parse_qs(query.replace("+", "%2B"), keep_blank_values=True)
    if not source or set(options) - {"text", "dataset"} or [""] in options.values():
        raise UsageError(
            f"got the task {spec!r}. Expected hf:FOLDER, hf:FOLDER?text=FILE or "
            "hf:FOLDER?dataset=NAME. Name the folder of a saved Hugging Face model, and a plain "
            "text file or a dataset."
        )
    from blast_search.tasks.hf import HFTask

    text, dataset = (options.get(name, [None])[0] for name in ("text", "dataset"))
    return HFTask(source, text, dataset)


def _call(spec: str, module_name: str, function_name: str) -> object:
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        missing = error.name or module_name
        if isinstance(error, ModuleNotFoundError) and not f"{module_name}.".startswith(
            f"{missing}."
        ):
            raise MissingDependencyError(
                f"the task {spec!r} imports the module {missing}, which is not installed here. "
                "Run: pip install PACKAGE, the package that holds it (its name may be another)."
            ) from error
        raise UsageError(
            f"cannot import the module {module_name!r} of the task {spec!r}: {error}. {_FORMS} "
            "Run the command in the folder that holds the module, or install it."
        ) from error
    except SyntaxError as error:
        raise UsageError(
            f"the module {module_name!r} of the task {spec!r} is not valid Python: {error}. "
            "Expected a module that can be imported; correct that line."
        ) from error
    except SystemExit as left:
        raise UsageError(
            f"the module {module_name!r} of the task {spec!r} {exit_text(left)}"
        ) from left
    except Exception as error:
        raise UsageError(
            f"the module {module_name!r} of the task {spec!r} failed as it was imported: "
            f"{type(error).__name__}: {error}. Expected a module that can be imported."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(
            f"the module {module_name!r} has no function {function_name!r}. Expected a function "
            "that takes no arguments and returns a task."
        )
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise UsageError(
            f"the function {spec!r} cannot be called without arguments ({error}). Expected one "
            "that can; give its arguments default values."
        ) from error
    except ValueError:  # a built-in that does not tell its signature
        pass
    return function()


def exit_text(left: SystemExit) -> str:
    """What to say of a module that ends the program as it is imported, as scripts do."""
    code = "" if left.code is None else repr(left.code)
    return (
        f"called sys.exit({code}) as it was imported. Put that under if __name__ == '__main__':, "
        "so that only running the file as a script does it."
    )


def check_task(spec: str, task: object) -> Task:
    """The object, if it is a task.

    Args:
        spec: how a message names it.

    Raises:
        UsageError: a part of the Task protocol is missing.
    """
    missing = [name for name in _METHODS if not callable(getattr(task, name, None))]
    metric = getattr(task, "metric", None)
    if not isinstance(getattr(task, "name", None), str):
        missing.insert(0, "name (a string)")
    if not _is_metric(metric):
        missing.insert(0, f'metric (a pair such as ("accuracy", True), got {metric!r})')
    if missing or isinstance(task, type):
        what = "the class itself" if isinstance(task, type) else type(task).__name__
        raise UsageError(
            f"the task {spec!r} is {what}, without: {', '.join(missing) or 'an instance'}. "
            "Expected an object with name, metric and the methods of blast_search.Task."
        )
    return task  # type: ignore[return-value]


def _is_metric(metric: object) -> bool:
    """Whether it is a name and a bool; "min" in the place of False would count as True."""
    if not isinstance(metric, Sequence) or isinstance(metric, str) or len(metric) != 2:
        return False
    return isinstance(metric[0], str) and isinstance(metric[1], bool)
