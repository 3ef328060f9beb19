"""Every command and every line of Python in the README runs; its tables are kept results."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from blast_search.space import SearchSpace, space_values

PARTS = ("model", "environment", "budget", "predicted")


def blocks(project: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (project / "README.md").read_text(), re.S)


@pytest.fixture
def clone(project: Path, tmp_path: Path) -> Path:
    """A folder with the examples, as in a clone; results go to its own results/."""
    (tmp_path / "examples").symlink_to(project / "examples")
    return tmp_path


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of these tests' own: the commands share measured cells, as a user's do."""
    return tmp_path_factory.mktemp("cache")


def environment(project: Path, clone: Path, cells: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": f"{project}:{clone}",
        "BLAST_SEARCH_CACHE": "on",
        "XDG_CACHE_HOME": str(cells),
    }


def test_make_targets_exist(project: Path):
    makefile = (project / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "".join(blocks(project, "sh")), re.M)
    assert targets == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)
    assert "$(BIN)/blast-search --budget 0.3\n" in makefile


@pytest.mark.slow
def test_every_command_runs(project: Path, clone: Path, cells: Path):
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
            cwd=clone, env=environment(project, clone, cells), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.slow
def test_the_python_example_runs(project: Path, clone: Path, cells: Path):
    (code,) = blocks(project, "python")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=clone, env=environment(project, clone, cells), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_fields_of_plans_and_the_keys_of_spaces_are_described(project: Path):
    text = (project / "docs/plan.md").read_text()
    plan = json.loads((project / "results/minilm-0.3/plan.json").read_text())
    for part in (plan, plan["measured"], plan["search"], *map(plan.get, PARTS)):
        assert [key for key in part if f"`{key}`" not in text and not key.endswith("_ci95")] == []
    readme = (project / "README.md").read_text()
    assert [key for key in space_values(SearchSpace()) if f"`{key}`" not in readme] == []


def test_links_lead_to_files(project: Path):
    for page in (project / "README.md", *project.glob("docs/*.md"), project / "results/README.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_its_tables_are_kept_results(project: Path):
    readme = (project / "README.md").read_text()
    shown = re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", readme, re.S)
    assert [Path(path).parts[1] for path, _ in shown] == ["minilm-0.3", "gpu"]
    for path, table in shown:
        assert table.strip() == (project / path).read_text().strip()
