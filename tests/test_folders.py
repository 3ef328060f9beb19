"""What verbs may write over: a folder of another device, model or run is refused, untouched."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from blast_search import cli
from blast_search.files import append_row, write_json
from blast_search.space import DENSE, Call, LayerSpec
from blast_search.tables import FIELDS, Cell, cell_row


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leave:
        cli.main(list(arguments))
    return int(leave.value.code or 0)


def held(folder: str | Path) -> dict[str, bytes]:
    """What is in a folder, but for its lock."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in files}


PROFILE = ["profile", "--task", "toy:task", "--workers", "local", "--space", "quick", "-q"]


def test_a_profile_refuses_the_folder_of_a_run(capsys):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("seed: 0\n")
    Path("run/layers.json").write_text("{}")
    before = held("run")
    assert call(*PROFILE, "--out", "run") == 2
    assert "run is the folder of a run" in capsys.readouterr().err
    assert call(*PROFILE, "--out", "run", "--dry-run") == 2
    assert held("run") == before


def test_a_profile_refuses_the_folder_of_another_device_or_model_untouched(capsys):
    layer = LayerSpec("more", 64, 64, True, (Call(8),))
    write_json(Path("layers.json"), {"layers": [asdict(layer)], "skipped": {}})
    write_json(Path("environment.json"), {"device": "other"})
    before = held(".")
    assert call(*PROFILE, "--out", ".") == 2
    assert ". is a profile of other layers (" in capsys.readouterr().err
    assert held(".") == before
    cell = Cell("other", "eager", "float32", "c", 64, 64, True, 8, DENSE)
    append_row(Path("latency.csv"), FIELDS, cell_row(cell, None, "failed"))
    before = held(".")
    assert call(*PROFILE, "--out", ".") == 4
    assert "use another run folder (--out) here" in capsys.readouterr().err
    assert held(".") == before
