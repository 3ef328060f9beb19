"""The cost of a search before it is begun: what is to be measured, and what is on file."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from blast_search.cellcache import open_cache
from blast_search.latency import CELL_SECONDS, missing_cells
from blast_search.prepared import prepare
from blast_search.progress import Reporter, console
from blast_search.runfolder import RunFolder
from blast_search.sensitivity import ProbeTable
from blast_search.settings import SETTING_NAMES, Settings
from blast_search.space import kept_space, load_space
from blast_search.storage import own_file_damaged
from blast_search.tables import LatencyTable
from blast_search.tasks import SHAPES, load_task


def forecast(values: Mapping[str, Any], report: Reporter, silent: bool) -> dict[str, Any]:
    """What a search would measure, what is on file, and about how long the rest takes."""
    settings = Settings(**{k: values[k] for k in SETTING_NAMES})
    settings.check()
    task = load_task(settings.task)
    out = Path(values["out"]) if values.get("out") else None
    # A run to be resumed searches the space that it was started with.
    space = kept_space(out, settings.space) if out else load_space(settings.space)
    prepared = prepare(task, settings, space, meta=settings.task.startswith(SHAPES))
    if prepared.note:
        report.say(prepared.note)
    cells = missing = prepared.cells()
    done: dict[str, int] = {}
    if out:
        table = LatencyTable.open(out / "latency.csv", prepared.fingerprint)
        missing, done = missing_cells(table, cells), on_file(out)
    cache = open_cache(prepared.fingerprint)
    cached = sum(cell in cache.cells for cell in missing)
    naive = sum(len(space.candidates(ly)) * len(ly.calls) for ly in prepared.layers)
    result = {
        "layers": len(prepared.layers),
        "cells": len(cells),
        "cells_are_at_most": settings.profile == "pruned",  # which ones depends on the first
        "cells_without_sharing": naive,
        "cells_on_file": len(cells) - len(missing),
        "cells_in_cache": cached,
        "cells_to_measure": len(missing) - cached,
        "probes": max(0, len(prepared.layers) - done.get("probes_on_file", 0)),
        "trials": max(0, settings.trials - done.get("trials_on_file", 0)),
        **done,
        "predicted_profile_minutes": round(
            (len(missing) - cached) * (CELL_SECONDS + 0.15) / 60, 1
        ),
        # What the rest takes depends on the task's model and data, which nobody has run yet.
        "minutes_cover": "profiling alone; not calibration, probes, trials, timing and retraining "
        "of whole models",
    }
    if not silent:
        most = (
            "cells", "cells_without_sharing", "cells_to_measure", "predicted_profile_minutes",
        )  # fmt: skip
        for key, value in result.items():
            bound = "at most " if key in most and settings.profile == "pruned" else ""
            if key != "cells_are_at_most":
                console().print(f"{key.replace('_', ' '):<28} {bound}{value}", markup=False)
    return result


def on_file(run: Path) -> dict[str, int]:
    """What a resumed run does not repeat, beside its cells (a study in --storage not counted).

    Raises:
        IncompatibleInputError: a damaged file.
    """
    probes = ProbeTable.open(run / "probes.csv").values
    return {
        "probes_on_file": sum(kind == "probe" for kind, *_ in probes),
        "trials_on_file": _stored_trials(run / "study.db"),
        "measurements_on_file": len(RunFolder.open(run).measured),
    }


def _stored_trials(path: Path) -> int:
    """How many trials an Optuna study in an SQLite file holds; without loading Optuna."""
    if not path.is_file():
        return 0
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return int(database.execute("SELECT COUNT(*) FROM trials").fetchone()[0])
    except sqlite3.Error as error:
        raise own_file_damaged(path, error) from error
