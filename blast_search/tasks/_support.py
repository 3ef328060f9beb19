"""What the built-in tasks share: package checks, data files, quiet loading."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from blast_search.errors import MissingDependencyError


def data_bytes(name: str) -> bytes:
    """The content of a file in blast_search/tasks/data, also from an installed wheel.

    Raises:
        MissingDependencyError: the installation lacks the file.
    """
    try:
        return resources.files("blast_search.tasks").joinpath("data", name).read_bytes()
    except OSError as error:
        raise MissingDependencyError(
            f"the data file {name} is missing from this installation of blast_search; "
            "run: pip install --force-reinstall --no-deps blast-search"
        ) from error


def require(task: str, install: str, *packages: str) -> None:
    """Check that all packages (import names) are installed, without importing them.

    Raises:
        MissingDependencyError: one is not; the message holds the command `install`.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"task {task} needs {' and '.join(missing)}, not installed here; run: {install}"
        )


def package_folder(task: str, install: str, package: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"task {task} needs {package}, not installed here; run: {install}"
        )
    return Path(spec.origin).parent


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Import and load with transformers: offline, no progress bars, no load reports."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging: Any = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
