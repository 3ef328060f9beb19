"""Text of a Hugging Face dataset, as documents.  Needs datasets; nothing is downloaded."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blast_search.errors import IncompatibleInputError, UsageError
from blast_search.tasks._support import require
from blast_search.tasks._text import MIN_DOCUMENTS, PARTS, cut_documents

INSTALL = "pip install datasets"
SAVED = ("state.json", "dataset_dict.json")  # save_to_disk writes one of them
STRINGS = ("string", "large_string", "string_view")


def read_dataset(name: str, limit: int) -> list[str]:
    """Up to 64 documents of a dataset, each of consecutive rows joined by line ends.

    The rows are cut into 64 stretches of equal length (each row is one where there are fewer),
    and a document is the start of its stretch: so the text comes from the whole dataset, however
    it is sorted, and no row is in two documents.  Rows without text are left out.  A dataset of
    fewer than 8 such documents is cut as a text file is.

    Args:
        name: a folder written by save_to_disk, a folder of data files (JSON lines, CSV, Parquet,
            text), or the name of a dataset in the local cache of datasets; after a colon the
            configuration, where there are several.  Of several splits "train" is read, and all of
            them one after another where none has that name.  The text is the column "text", or
            the first column of strings.
        limit: characters to read in all, whatever the size of the dataset.

    Raises:
        MissingDependencyError: datasets is not installed.
        UsageError: no such dataset, no column of strings, or too little text.
        IncompatibleInputError: a saved dataset is damaged, or was saved without a row.
    """
    require("hf with a dataset", INSTALL, "datasets")
    with _quiet_offline() as datasets:
        rows, column = _column(datasets, name, _splits(datasets, name))
        documents = _stretches(rows, limit)
    if len(documents) < MIN_DOCUMENTS:
        documents = cut_documents(
            "\n".join(documents), f"the column {column!r} of the dataset {name}"
        )
    return documents


def _splits(datasets: Any, name: str) -> list[Any]:
    """The splits to read, in their order."""
    path, configuration = name, None
    if not Path(name).is_dir():
        path, _, configuration = name.partition(":")
    saved = any(Path(path, file).is_file() for file in SAVED)
    try:
        if saved:
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # of a dozen kinds
        if saved:
            raise _damaged(path, error) from error
        hint = ""
        if not Path(path).exists() and not Path(path).is_absolute():
            arguments = ", ".join(map(repr, filter(None, (path, configuration))))
            hint = (
                "; for a dataset of the hub, first run: "
                f'python -c "import datasets; datasets.load_dataset({arguments})"'
            )
        raise UsageError(
            f"cannot load the dataset {name} ({_reason(error)}). Expected a folder written by "
            f"save_to_disk, a folder of data files, or a name in the local cache{hint}"
        ) from error
    if not isinstance(found, dict):
        return [found]
    return [found["train"]] if "train" in found else list(found.values())


def _column(datasets: Any, name: str, splits: list[Any]) -> tuple[Any, str]:
    """All rows of the text column, as one dataset, and the column's name."""
    features = dict(splits[0].features) if splits else {}
    strings = [key for key, kind in features.items() if getattr(kind, "dtype", "") in STRINGS]
    if not strings:
        raise UsageError(
            f"the dataset {name} has no column of strings (its columns: "
            f"{', '.join(features) or 'none'}). Expected a column text; rename or add one."
        )
    column = "text" if "text" in strings else strings[0]
    try:
        columns = [split.with_format(None).select_columns([column]) for split in splits]
        return datasets.concatenate_datasets(columns), column
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"the splits of the dataset {name} differ in their columns ({_reason(error)}). "
            f"Expected strings in {column!r} of each; name the folder of one split."
        ) from error


def _stretches(rows: Any, limit: int) -> list[str]:
    parts = max(min(PARTS, len(rows)), 1)
    size = max(limit // parts, 1)
    documents = []
    for part in range(parts):
        stretch = rows.select(range(part * len(rows) // parts, (part + 1) * len(rows) // parts))
        texts: list[str] = []
        length = 0
        for text in _texts(stretch):
            texts.append(text[: size - length])
            length += len(texts[-1]) + 1
            if length >= size:
                break
        documents.append("\n".join(texts))
    return [document for document in documents if document]


def _texts(stretch: Any) -> Iterator[str]:
    """The rows of one column that hold text."""
    for batch in stretch.iter(batch_size=64):
        for column in batch.values():
            yield from (text for text in column if text and not text.isspace())


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first; datasets wraps it in words that say less."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__


def _damaged(path: str, error: Exception) -> IncompatibleInputError:
    return IncompatibleInputError(
        f"the dataset in {path} is damaged or empty ({_reason(error)}). Save it again "
        "(save_to_disk)."
    )


@contextmanager
def _quiet_offline() -> Iterator[Any]:
    """The module datasets, offline, without progress bars and remarks."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    datasets: Any = importlib.import_module("datasets")
    config, logging = datasets.config, datasets.logging
    offline, verbosity = config.HF_HUB_OFFLINE, logging.get_verbosity()
    bars = datasets.is_progress_bar_enabled()
    config.HF_HUB_OFFLINE = True  # also where the hub's library was imported before
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        config.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
