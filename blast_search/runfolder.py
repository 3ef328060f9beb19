"""The run folder: what was asked, what was measured, and nothing measured twice.

`measured.csv` logs every whole-model measurement as it finishes, keyed by what was built (the
digest of a plan's choices), so that a resumed run finds it again whatever led it there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from blast_search.errors import IncompatibleInputError, UsageError
from blast_search.files import (
    append_row,
    make_folder,
    parse_json,
    read_rows,
    read_yaml_mapping,
    sha256_json,
    write_text,
)
from blast_search.plan import Choices

FIELDS = ("kind", "digest", "plan", "value")


def digest(choices: Choices) -> str:
    """What is built: choices by layer, as a short digest."""
    return sha256_json({name: c.key for name, c in choices.items()})[:16]


@dataclass
class RunFolder:
    """An open run folder (its lock is held by the caller)."""

    path: Path
    measured: dict[tuple[str, str], Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        folder = cls(path)
        for row in read_rows(path / "measured.csv", FIELDS):
            value = parse_json(row["value"], f"{path / 'measured.csv'}: {row['plan']}")
            folder.measured[row["kind"], row["digest"]] = value
        return folder

    def once(self, kind: str, key: str, plan: str, measure: Callable[[], Any]) -> Any:
        """The measurement on file, else `measure()`, appended to the file."""
        if (kind, key) not in self.measured:
            value = json.dumps(measure(), allow_nan=False)
            row = {"kind": kind, "digest": key, "plan": plan, "value": value}
            append_row(self.path / "measured.csv", FIELDS, row)
            self.measured[kind, key] = json.loads(value)
        return self.measured[kind, key]


def start_folder(out: Path, resume: bool, config: dict[str, Any]) -> dict[str, Any]:
    """Write config.yaml for a new run, or check it against the one of the run to resume.

    Returns:
        The configuration in force.

    Raises:
        UsageError: resuming where there is no run, or starting over an existing one.
        IncompatibleInputError: a damaged config.yaml.
    """
    file = out / "config.yaml"
    if resume:
        if not file.is_file():
            raise UsageError(
                f"{out} holds no run to resume (no config.yaml). Start one with --out {out}."
            )
        stored = read_yaml_mapping(file)
        if set(stored) != set(config):
            odd = sorted(set(stored) ^ set(config))
            raise IncompatibleInputError(f"{file}: missing or unknown keys {odd}.")
        return stored
    if file.exists():
        raise UsageError(
            f"{out} already holds a run. Continue it with --resume {out}, or choose another --out."
        )
    make_folder(out)
    write_text(file, yaml.safe_dump(config, sort_keys=False))
    return config
