"""Files that are either whole or absent: atomic writes, strict reads, one lock per run folder.

Formats are JSON, CSV, YAML, SQLite and safetensors only.  Nothing here unpickles.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from blast_search.errors import BlastSearchError, IncompatibleInputError, RunLockedError


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: temporary file beside it, fsync, replace."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _no_constants(text: str) -> Any:
    raise ValueError(f"{text} is not valid JSON")


def finite(text: str) -> float:
    """A number in a file; ValueError where it is none, or not finite."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value


def parse_json(text: str, origin: str) -> Any:
    """JSON without NaN, Infinity or repeated keys.

    Raises:
        IncompatibleInputError: naming `origin`.
    """
    try:
        return json.loads(
            text,
            parse_constant=_no_constants,
            parse_float=finite,
            object_pairs_hook=_no_duplicates,
        )
    except (ValueError, RecursionError) as error:
        raise IncompatibleInputError(
            f"{origin} is not valid JSON ({error}). Expected a file written by blast-search. "
            "Write it again, or restore it from a copy."
        ) from error


def read_text(path: Path) -> str:
    """The text of `path`; a missing, binary or unreadable file is an error that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise IncompatibleInputError(f"{path} does not exist. Check the path.") from None
    except UnicodeDecodeError:
        raise IncompatibleInputError(
            f"{path} is not a text file (a pickle or another binary?). blast-search reads only "
            "JSON, CSV, YAML, SQLite and safetensors."
        ) from None
    except OSError as error:
        raise IncompatibleInputError(f"{path} cannot be read: {error.strerror}.") from error


def read_json(path: Path) -> Any:
    return parse_json(read_text(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise IncompatibleInputError(
            f"{path} holds {type(value).__name__}, expected an object. Restore it from a copy."
        )
    return value


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping with string keys (safe loader)."""
    try:
        value = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise IncompatibleInputError(f"{path} is not valid YAML: {detail}") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise IncompatibleInputError(
            f"{path} holds {type(value).__name__}, expected `key: value` lines with names as keys."
        )
    return value


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Digest of the canonical form (sorted keys, no spaces) of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def append_row(path: Path, fields: Sequence[str], row: Mapping[str, Any]) -> None:
    """Append one CSV row durably, with a header if the file is new.

    A run that was killed in the middle of a write leaves a torn last line; it is cut off first,
    so that it can never glue itself to the new row.  Processes that append to one file wait for
    each other.
    """
    with path.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # until it is closed
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, end - 1))
        if end and stream.read(1) != b"\n":
            stream.seek(0)
            end = stream.read().rfind(b"\n") + 1
            stream.truncate(end)
        text = io.StringIO()
        writer = csv.DictWriter(text, fields, lineterminator="\n")
        if not end:
            writer.writeheader()
        writer.writerow(row)
        stream.write(text.getvalue().encode())
        stream.flush()
        os.fsync(stream.fileno())


def read_rows(
    path: Path, fields: Sequence[str], later: Sequence[str] = ()
) -> list[dict[str, str]]:
    """The rows of a CSV file written by `append_row`; [] where there is no file.

    Args:
        later: columns at the end that an older file may lack; they are "" then.

    A torn last line (no newline) is an unfinished write and is dropped; any other damage is an
    IncompatibleInputError that names file and line.
    """
    if not path.exists():
        return []
    text = read_text(path)
    text = text[: text.rfind("\n") + 1]
    if not text:
        return []
    reader = csv.DictReader(io.StringIO(text))
    header = list(reader.fieldnames or [])
    if header not in (list(fields), [*fields, *later]):
        raise IncompatibleInputError(
            f"{path}: header is {reader.fieldnames}, expected {list(fields)}. "
            "The file was edited or comes from another version: move it away and measure again."
        )
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise IncompatibleInputError(
                    f"{path}, line {reader.line_num}: {len(header)} columns expected. "
                    "Remove the damaged line; it will be measured again."
                )
            rows.append(dict.fromkeys(later, "") | row)
    except csv.Error as error:  # a stray quote makes one field of all that follows
        raise IncompatibleInputError(
            f"{path}, line {reader.line_num}: {error}. Restore the file."
        ) from error
    return rows


def write_rows(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def cache_folder() -> Path:
    """What outlives a run (models, cells): $XDG_CACHE_HOME/blast-search, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "blast-search"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_run(folder: Path) -> bool:
    """Whether a search or a comparison was started in this folder."""
    return (folder / "config.yaml").is_file()


def make_folder(folder: Path) -> Path:
    """Create `folder`, or say in one line why it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BlastSearchError(
            f"{folder} cannot be written: {error.strerror}. Choose another folder with --out."
        ) from error
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel releases it when the process ends, however it ends.

    Raises:
        RunLockedError: another process holds it.
    """
    with (folder / ".lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunLockedError(
                f"{folder} is in use by another blast-search. Wait for it, or choose --out."
            ) from None
        yield
