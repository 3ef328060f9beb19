"""A run folder's own study.db: damage is told by its name, not as a matter of --storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from blast_search import study
from blast_search.errors import BlastSearchError, IncompatibleInputError
from blast_search.storage import Storage


def test_a_damaged_study_of_the_run_is_corrupt_input(tmp_path: Path):
    path = tmp_path / "study.db"
    own = Storage(f"sqlite:///{path}")
    study.Study(["x"], own, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))  # all but its header
    with pytest.raises(IncompatibleInputError, match=r"study\.db is no study that can be read"):
        study.Study(["x"], own, 0)
    path.write_text("no database")
    with pytest.raises(IncompatibleInputError, match="remove it: its trials will be run again"):
        study.Study(["x"], own, 0)
    with pytest.raises(BlastSearchError, match="--storage"):
        study.Study(["x"], Storage(own.url, worker="me"), 0)
