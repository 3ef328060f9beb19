"""Options beside --resume and --config: what contradicts or cannot be is refused, not ignored."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from command import call

from blast_search.compare import CompareSettings
from blast_search.settings import Settings

RUN = ["search", "--resume", "run", "-q"]


@pytest.fixture(autouse=True)
def _run(workplace) -> None:
    Path("run").mkdir()
    stored(budget=0.5)


def stored(kind: type[Settings] = Settings, **values: object) -> None:
    settings = asdict(kind(task="toy:task", space="quick")) | values
    Path("run/config.yaml").write_text(yaml.safe_dump(settings))


CONTRADICTIONS = {
    "another folder": (["--out", "elsewhere"], "out cannot change"),
    "another budget by config": (["--config", "c.yaml"], "budget cannot change"),
    "another folder by config": (["--config", "o.yaml"], "out cannot change"),
    "unknown workers": (["--workers", "dask"], "workers is 'dask'"),
    "a cluster for local workers": (
        ["--workers", "local", "--ray-address", "auto"],
        "--ray-address auto without Ray: workers is 'local'",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_a_run_to_resume_is_refused_by_the_dry_run_too(case: str, capsys):
    Path("c.yaml").write_text("budget: 0.4\nspace: quick\n")
    Path("o.yaml").write_text("out: elsewhere\n")
    options, text = CONTRADICTIONS[case]
    for more in ([], ["--dry-run"]):
        assert call(*RUN, *options, *more) == 2
        assert text in capsys.readouterr().err
    if case.startswith("another folder") and "--config" not in options:
        stored(CompareSettings, budget=0.5)
        assert call("compare", "--resume", "run", *options) == 2
        assert text in capsys.readouterr().err


def test_what_agrees_with_a_run_to_resume_is_taken(capsys):
    Path("c.yaml").write_text("budget: 0.5\nout: run\nworkers: local\nspace: quick\n")
    agreeing = ["--config", "c.yaml", "--out", "./run", "--budget", "0.5"]
    assert call(*RUN, *agreeing, "--dry-run") == 0


def test_a_run_goes_on_with_the_workers_that_it_was_started_with(capsys):
    address = ["--ray-address", "some:1"]  # refused beside workers that are not Ray's
    stored(budget=0.5, workers="local")
    stored_compare = asdict(CompareSettings(task="toy:task", budget=0.5)) | {"workers": "local"}
    assert call(*RUN, "--dry-run", *address) == 2
    assert "workers is 'local'" in capsys.readouterr().err
    assert call(*RUN, "--dry-run", *address, "--workers", "ray") == 0
    stored(budget=0.5)  # an older run: as it was
    assert call(*RUN, "--dry-run", *address) == 0
    Path("run/config.yaml").write_text(yaml.safe_dump(stored_compare))
    assert call("compare", "--resume", "run", *address) == 2
    assert "workers is 'local'" in capsys.readouterr().err


def test_the_dry_run_of_a_resumed_run_takes_the_space_that_it_kept(capsys):
    stored(budget=0.5, space="mine.yaml")  # a file that is gone
    Path("run/space.yaml").write_text("num_blocks: [2]\nkeep: [0.5]\n")
    assert call(*RUN, "--dry-run", "--json") == 0
    few = json.loads(capsys.readouterr().out)["cells"]
    Path("mine.yaml").write_text("num_blocks: [1, 2, 4]\nkeep: [0.1, 0.2, 0.3]\n")
    assert call(*RUN, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["cells"] == few
    Path("run/space.yaml").unlink()  # an older run: the file that it names
    assert call(*RUN, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["cells"] > few


def test_workers_are_checked_by_every_verb_that_has_them(capsys):
    odd = ["--task", "toy:task", "--workers", "local", "--ray-address", "auto"]
    for verb in (["profile"], ["profile", "--dry-run"], ["compare", "--budget", "0.5"]):
        assert call(*verb, *odd) == 2
        assert "without Ray" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"), [("task", 5), ("budget", "abc"), ("seed", -3), ("profile", [1])]
)
def test_a_damaged_configuration_of_a_run_is_corrupt_input(key: str, value: object, capsys):
    stored(**{"budget": 0.5, key: value})
    for more in ([], ["--dry-run"]):
        assert call(*RUN, *more) == 4
        message = capsys.readouterr().err
        assert message.startswith("error: run/config.yaml was edited or damaged: ")
        assert f"{key} is " in message
    stored(CompareSettings, **{"budget": 0.5, key: value})
    assert call("compare", "--resume", "run") == 4


@pytest.mark.parametrize("text", ["task: 5", "task:", "out: 5", "ray_address: [a]"])
def test_a_config_file_of_other_types_is_corrupt_input(text: str, capsys):
    Path("c.yaml").write_text(f"{text}\nbudget: 0.5\n")
    for more in ([], ["--dry-run"]):
        assert call("search", "--config", "c.yaml", *more) == 4
        assert "expected text" in capsys.readouterr().err
