"""Text for language tasks: documents, disjoint splits of them, rows of token ids."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from blast_search.errors import UsageError
from blast_search.tasks._support import data_bytes

PARTS = 64  # documents that a user's text is cut into
MIN_DOCUMENTS = 8  # that can be split: see split_documents


class Splits(NamedTuple):
    """Documents for each use; no document is in two of them."""

    calibration: list[str]
    evaluation: list[str]
    training: list[str]


@cache
def wikipedia() -> list[str]:
    """74 English Wikipedia articles (the first 12,000 characters of each), shuffled once."""
    lines = gzip.decompress(data_bytes("wikipedia.jsonl.gz")).decode().splitlines()
    return [json.loads(line)["text"] for line in lines]


def read_documents(path: Path) -> list[str]:
    """A text file as about 64 consecutive documents of equal size, cut at line ends or spaces.

    Raises:
        UsageError: the file cannot be read as UTF-8, or is too short to be split.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the text file {path}: {error}. Expected plain UTF-8 text; "
            "check the path after text=."
        ) from error
    return cut_documents(text, f"the text file {path}")


def cut_documents(text: str, what: str) -> list[str]:
    """About 64 consecutive documents of equal size; `what` names the text in errors.

    Raises:
        UsageError: the text is too short to be split.
    """
    units = text.splitlines(keepends=True)
    if len(units) < 2 * PARTS:  # few long lines: cut at spaces instead
        units = [word + " " for word in text.split()]
    size = max(len(text) // PARTS, 1)
    documents: list[str] = [""]
    for unit in units:
        if len(documents[-1]) >= size:
            documents.append("")
        documents[-1] += unit
    if len(documents) < MIN_DOCUMENTS:
        raise UsageError(
            f"{what} has {len(text):,} characters, too few to be split. Expected 100,000 or more "
            "for a steady perplexity; give a longer text."
        )
    return documents


def split_documents(documents: Sequence[str]) -> Splits:
    """Of every eight documents, two for evaluation, one for calibration, five for training."""
    return Splits(
        calibration=[text for i, text in enumerate(documents) if i % 8 == 2],
        evaluation=[text for i, text in enumerate(documents) if i % 4 == 0],
        training=[text for i, text in enumerate(documents) if i % 4 and i % 8 != 2],
    )


def token_rows(
    documents: Sequence[str],
    encode: Callable[[str], list[int]],
    length: int,
    count: int | None = None,
) -> list[list[int]]:
    """Up to `count` rows of exactly `length` token ids, each from within one document.

    Rows go round the documents: the first of each, then the second of each.  `count` None takes
    all of them.  Documents shorter than a row are joined first where no document fills one.
    """
    encoded = [encode(text) for text in documents]
    if all(len(tokens) < length for tokens in encoded):
        encoded = [[token for tokens in encoded for token in tokens]]
    rows: list[list[int]] = []
    for start in range(0, max(map(len, encoded), default=0), length):
        for tokens in encoded:
            if len(tokens) >= start + length and (count is None or len(rows) < count):
                rows.append(tokens[start : start + length])
    return rows
