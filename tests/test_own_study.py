"""Studies and their databases: damage is told by its name, a short failure is survived."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.exceptions import StorageInternalError

from blast_search import study
from blast_search.errors import BlastSearchError, IncompatibleInputError
from blast_search.storage import Storage, add_trial


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


def test_a_database_that_fails_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    class Database:
        def __init__(self, failures: int) -> None:
            self.failures, self.stored = failures, list[str]()

        def add_trial(self, trial: Any) -> None:
            self.failures -= 1
            if self.failures >= 0:
                raise StorageInternalError("the connection was lost")
            self.stored.append(trial)

    monkeypatch.setattr("time.sleep", lambda _: None)
    shared = Storage("postgresql+psycopg2://me@host/db", worker="me")
    brief, gone = Database(2), Database(99)
    add_trial(brief, shared, "a trial")
    assert brief.stored == ["a trial"]
    with pytest.raises(BlastSearchError, match=r"database host/db cannot be used"):
        add_trial(gone, shared, "a trial")


def test_a_trial_that_was_stored_twice_counts_once(tmp_path: Path):
    shared = Storage(f"sqlite:///{tmp_path / 'shared.db'}", worker="me")
    mine = study.Study(["x"], shared, 0)
    (asked,) = mine.ask(0, 1)
    outcome = study.Outcome([1.0], 0.3, 0.0, {"a": "dense"}, "weights", False)
    mine.tell(asked, outcome, (0, 1))
    mine.flush()
    add_trial(mine._stored, shared, mine.trials[0])  # as where the first answer was lost
    assert study.Study(["x"], shared, 0).sync() == 1


def test_a_trial_that_cannot_be_stored_in_the_run_is_told_as_that(tmp_path: Path):
    own = Storage(f"sqlite:///{tmp_path / 'study.db'}")
    mine = study.Study(["x"], own, 0)
    (tmp_path / "study.db").unlink()
    (asked,) = mine.ask(0, 1)
    mine.tell(asked, study.Outcome([1.0], 0.3, 0.0, {"a": "dense"}, "weights", False), (0, 1))
    with pytest.raises(BlastSearchError, match=r"a trial cannot be stored in .*study\.db"):
        mine.flush()
