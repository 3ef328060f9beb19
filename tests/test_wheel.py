"""The wheel holds everything that a run needs, and works in another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The wheel's content as it would lie in site-packages."""
    project = Path(__file__).resolve().parent.parent
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves traces in the source tree
    subprocess.run(["git", "clone", "-q", str(project), str(source)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "-w", str(folder), str(source)],
        check=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_data_and_spaces_are_inside(unpacked: Path):
    assert {p.name for p in (unpacked / "blast_search/search_spaces").glob("*.yaml")} == {
        "default.yaml", "paper.yaml", "quick.yaml",
    }  # fmt: skip
    data = {p.name for p in (unpacked / "blast_search/tasks/data").iterdir()}
    assert data >= {"wordnet.tsv.gz", "wikipedia.jsonl.gz", "fashion.npz"}
    assert len([name for name in data if name.startswith("LICENSE")]) == 3
    assert (unpacked / "blast_search/py.typed").is_file()


def test_the_command_runs_from_another_folder(unpacked: Path, tmp_path: Path, project: Path):
    """Spaces are found by name, and the code that runs is the wheel's."""
    env = os.environ | {"PYTHONPATH": f"{unpacked}:{project / 'tests'}"}
    for space in ("default", "paper", "quick"):
        done = subprocess.run(
            [sys.executable, "-m", "blast_search.cli", "--budget", "0.3", "--dry-run", "--json",
             "--task", "toy:task", "--space", space],
            cwd=tmp_path, env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["cells"] > 0
    where = subprocess.run(
        [sys.executable, "-c", "import blast_search; print(blast_search.__file__)"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(unpacked))
