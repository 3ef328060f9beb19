"""The folder that a verb leaves a model in: locked, and nothing that a run has written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blast_search.errors import UsageError
from blast_search.files import is_run, locked, make_folder

OF_A_RUN = ("model", "plans")  # folders that a run writes in its own


@contextmanager
def leaving(target: Path, source: Path | None = None) -> Iterator[None]:
    """Hold the lock of the folder that a model goes to.

    A new folder is made at once, so that one that cannot be written is told before the work; it
    goes again if the work fails.  The lock's file goes in any case: a model folder is copied and
    shipped, and holds the model only.

    Args:
        source: the folder that the model comes from.  It may be the target, also where it is a
            run's: it was named to be changed.

    Raises:
        UsageError: what a run has written would be lost.
        RunLockedError: the folder, or the run that it belongs to, is in use.
    """
    here = target.resolve()
    inside = here.name in OF_A_RUN and is_run(here.parent)
    if is_run(here) or (inside and (source is None or here != source.resolve())):
        run = target if is_run(here) else target.parent
        raise UsageError(
            f"{target} holds what a run has written. Choose another --out; the run's own model "
            f"is in {run / 'model'}."
        )
    made = [folder for folder in (here, *here.parents) if not folder.exists()]
    with locked(here.parent if inside else make_folder(target)):
        try:
            yield
        except BaseException:
            _unlock(here, inside)
            with suppress(OSError):  # it holds something
                for folder in made:
                    folder.rmdir()
            raise
        _unlock(here, inside)


def _unlock(folder: Path, inside: bool) -> None:
    if not inside:  # a run keeps its own
        (folder / ".lock").unlink(missing_ok=True)
