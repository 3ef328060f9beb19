"""Every command and every line of Python in the README runs; its table is the kept result."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest


def blocks(project: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (project / "README.md").read_text(), re.S)


@pytest.fixture
def clone(project: Path, tmp_path: Path) -> Path:
    """A folder with the examples, as in a clone; results go to its own results/."""
    (tmp_path / "examples").symlink_to(project / "examples")
    return tmp_path


def environment(project: Path, clone: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{project}:{clone}"}


def test_make_targets_exist(project: Path):
    makefile = (project / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "".join(blocks(project, "sh")), re.M)
    assert targets == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)
    assert "$(BIN)/blast-search --budget 0.3\n" in makefile


@pytest.mark.slow
def test_every_command_runs(project: Path, clone: Path):
    commands = [
        shlex.split(line, comments=True)
        for block in blocks(project, "sh")
        for line in block.splitlines()
        if line.startswith("blast-search")
    ]
    assert len(commands) >= 10
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "blast_search.cli", *command[1:]],
            cwd=clone, env=environment(project, clone), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.slow
def test_the_python_example_runs(project: Path, clone: Path):
    (code,) = blocks(project, "python")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=clone, env=environment(project, clone), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_table_is_the_kept_result(project: Path):
    readme = (project / "README.md").read_text()
    shown = re.search(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", readme, re.S)
    assert shown
    assert shown[2].strip() == (project / shown[1]).read_text().strip()
