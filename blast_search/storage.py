"""The database that Optuna's studies live in, as --storage names it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blast_search.errors import (
    BlastSearchError,
    IncompatibleInputError,
    MissingDependencyError,
    in_one_line,
)

OPENINGS = 4  # attempts to open a database
SECRET = ("password", "passwd", "passfile", "sslpassword")  # in the query of a URL


@dataclass(frozen=True)
class Storage:
    """Where a study lives: an Optuna storage URL, the study's name in it, and who works on it.

    `worker` is "" where nobody else does.
    """

    url: str
    study: str = "blast-search"
    worker: str = ""


def check_database(url: str) -> None:
    """Open a database and close it again, before anything is measured that would go there.

    Raises:
        MissingDependencyError: the database's driver is not installed.
        BlastSearchError: the database cannot be used.
    """
    import optuna

    _opened(url, lambda: optuna.storages.RDBStorage(url).engine.dispose())


def without_password(url: str | None) -> str | None:
    """A storage URL as a run folder may keep it, which is passed on with all that is in it."""
    if url is None:
        return None
    from sqlalchemy.engine import URL, make_url
    from sqlalchemy.exc import ArgumentError

    try:
        u = make_url(url)
    except ArgumentError:  # `check_database` has the words for it
        return url
    query = {key: value for key, value in u.query.items() if key not in SECRET}
    if u.password is None and query == dict(u.query):
        return url
    public = URL.create(u.drivername, u.username, None, u.host, u.port, u.database, query)
    return public.render_as_string()


def open_study(storage: Storage) -> Any:
    """The stored study, created where there is none.

    Raises what `check_database` does, but for a run's own file: IncompatibleInputError.
    """
    import optuna

    return _opened(
        storage.url,
        lambda: optuna.create_study(
            study_name=storage.study, storage=storage.url, directions=["minimize"] * 2,
            load_if_exists=True,
        ),
        own=not storage.worker,
    )  # fmt: skip


def stored_trials(study: Any, storage: Storage) -> list[Any]:
    """The trials of a study that `open_study` opened; raises what that does."""
    reading = lambda: study.get_trials(deepcopy=False)  # noqa: E731
    trials: list[Any] = _opened(storage.url, reading, own=not storage.worker)
    return trials


def add_trial(study: Any, storage: Storage, trial: Any) -> None:
    """Store a finished trial in a study that `open_study` opened.

    Raises:
        BlastSearchError: it cannot be stored.
    """
    if storage.worker:
        _opened(storage.url, lambda: study.add_trial(trial))
        return
    try:
        study.add_trial(trial)
    except Exception as error:  # of the run's own file: it is full, or read-only
        path = storage.url.removeprefix("sqlite:///")
        raise BlastSearchError(
            f"a trial cannot be stored in {path} ({in_one_line(error)}). Make room for it, and "
            "continue the run with --resume: what was measured is on file."
        ) from error


def own_file_damaged(path: str | Path, error: Exception) -> IncompatibleInputError:
    """The error for the study.db of a run folder."""
    return IncompatibleInputError(
        f"{path} is no study that can be read ({' '.join(str(error).split())[:200]}). Restore it, "
        "or remove it: its trials will be run again."
    )


def _opened(url: str, opening: Callable[[], Any], own: bool = False) -> Any:
    """What `opening` returns, tried again where the database may only be busy.

    Args:
        own: the database is the run folder's own file, not one that was asked for.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    for attempt in range(OPENINGS):
        try:
            return opening()
        except ImportError as error:
            raise MissingDependencyError(
                f"the driver of --storage is not installed ({error}): for PostgreSQL, "
                "pip install psycopg2-binary."
            ) from error
        except (SQLAlchemyError, StorageInternalError, ValueError) as error:
            # Runs that open an empty database together race for the creation of its tables.
            if isinstance(error, ValueError) or attempt + 1 == OPENINGS:
                if own:
                    raise own_file_damaged(url.removeprefix("sqlite:///"), error) from error
                where = str(without_password(url)).rpartition("@")[2]  # and without the user
                raise BlastSearchError(
                    f"--storage: the database {where} cannot be used "
                    f"({' '.join(str(error).split())[:200]}). Expected a URL like "
                    "postgresql+psycopg2://user@host/database, and a server that answers. A run "
                    "folder keeps no password: with --resume, give --storage again."
                ) from error
            time.sleep(0.3 * (attempt + 1))
    raise AssertionError("the loop returns or raises")
