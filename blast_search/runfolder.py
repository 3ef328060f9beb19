"""The run folder: what was asked, what was measured, and nothing measured twice.

`measured.csv` logs every whole-model measurement as it finishes, keyed by what was built (the
digest of a plan's choices), so that a resumed run finds it again whatever led it there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from blast_search.errors import IncompatibleInputError, UsageError
from blast_search.files import (
    append_row,
    is_run,
    make_folder,
    parse_json,
    read_rows,
    read_yaml_mapping,
    sha256_json,
    write_text,
)
from blast_search.plan import Choices
from blast_search.settings import Settings

Kind = TypeVar("Kind", bound=Settings)

FIELDS = ("kind", "digest", "plan", "value")
STAGES = ("stage", "seconds")


def digest(choices: Choices) -> str:
    """What is built: choices by layer, as a short digest."""
    return sha256_json({name: c.key for name, c in choices.items()})[:16]


@dataclass
class RunFolder:
    """An open run folder (its lock is held by the caller)."""

    path: Path
    measured: dict[tuple[str, str], Any] = field(default_factory=dict)
    # stage -> seconds, of all sessions that worked on the run; stages.csv
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        folder = cls(path)
        for row in read_rows(path / "measured.csv", FIELDS):
            value = parse_json(row["value"], f"{path / 'measured.csv'}: {row['plan']}")
            folder.measured[row["kind"], row["digest"]] = value
        for row in read_rows(path / "stages.csv", STAGES):
            seconds = parse_json(row["seconds"], f"{path / 'stages.csv'}: {row['stage']}")
            if not isinstance(seconds, int | float):
                raise IncompatibleInputError(
                    f"{path / 'stages.csv'}: {row['stage']} took {seconds!r}, expected seconds. "
                    "Remove that line."
                )
            folder._add(row["stage"], seconds)
        return folder

    def took(self, stage: str, seconds: float) -> None:
        """Log what a stage took; of one that a kill cut short, only its measurements are left."""
        append_row(self.path / "stages.csv", STAGES, {"stage": stage, "seconds": f"{seconds:.1f}"})
        self._add(stage, seconds)

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 1)

    def once(self, kind: str, key: str, plan: str, measure: Callable[[], Any]) -> Any:
        """The measurement on file, else `measure()`, appended to the file."""
        if (kind, key) not in self.measured:
            value = json.dumps(measure(), allow_nan=False)
            row = {"kind": kind, "digest": key, "plan": plan, "value": value}
            append_row(self.path / "measured.csv", FIELDS, row)
            self.measured[kind, key] = json.loads(value)
        return self.measured[kind, key]


def start_folder(out: Path, config: dict[str, Any], space: dict[str, Any]) -> None:
    """Write config.yaml and space.yaml for a new run; UsageError over an existing one."""
    file = out / "config.yaml"
    if file.exists():
        raise UsageError(
            f"{out} already holds a run. Continue it with --resume {out}, or choose another --out."
        )
    make_folder(out)
    write_text(out / "space.yaml", yaml.safe_dump(space, sort_keys=False))
    write_text(file, yaml.safe_dump(config, sort_keys=False))


def stored_workers(folder: Path) -> str:
    """The workers with which the run in a folder was started; of an older one nobody knows."""
    return str(read_yaml_mapping(folder / "config.yaml").get("workers", "auto"))


def stored_settings(folder: Path, kind: type[Kind]) -> Kind:
    """The settings with which the run in a folder was started.

    Raises:
        UsageError: there is no run. IncompatibleInputError: a damaged config.yaml.
    """
    if not is_run(folder):
        raise UsageError(
            f"{folder} holds no run to resume (no config.yaml). Check the path, or start a run "
            f"with --out {folder}."
        )
    file = folder / "config.yaml"
    values = read_yaml_mapping(file)
    values.pop("workers", None)  # no setting: they may change from session to session
    if odd := set(values) ^ {f.name for f in fields(kind)}:
        step = "Restore it, or start a new run."
        if odd == {"seeds"}:
            step = f"It is of the verb {'compare' if 'seeds' in values else 'search'}: use that."
        raise IncompatibleInputError(f"{file}: missing or unknown keys {sorted(odd)}. {step}")
    stored = kind(**values)
    try:
        stored.check()
    except UsageError as error:
        raise IncompatibleInputError(
            f"{file} was edited or damaged: {error} Restore it, or start a new run."
        ) from error
    return stored
