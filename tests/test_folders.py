"""What verbs may write over: a folder of another device, model or run is refused, untouched."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from command import call
from test_apply import toy_plan
from toy import ToyTask

import blast_search as bs
from blast_search.files import append_row, locked, write_json
from blast_search.space import DENSE, Call, LayerSpec
from blast_search.tables import FIELDS, Cell, cell_row

pytestmark = pytest.mark.usefixtures("workplace")


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


@pytest.fixture
def run() -> Path:
    """A run folder, as far as verbs look at it: its plan, and the model that it left."""
    task = ToyTask()
    bs.save(bs.apply(task.model(), replace(toy_plan(), task="toy:task")), "run/model")
    bs.Plan.load("run/model").save("run/plan.json")
    Path("run/config.yaml").write_text("seed: 0\n")
    return Path("run")


def test_models_are_not_left_over_what_a_run_wrote(run: Path, capsys):
    plan, model = str(run / "plan.json"), str(run / "model")
    before = held(run)
    for out in ("run", "run/model", "run/../run/plans"):
        assert call("apply", plan, "--out", out, "-q") == 2
        assert "what a run has written. Choose another --out" in capsys.readouterr().err
        if out != model:  # which may be named to be changed
            assert call("retrain", model, "--out", out, "-q") == 2
            assert call("refresh", model, "--out", out, "-q") == 2
        capsys.readouterr()
    assert call("retrain", "run", "--steps", "0", "-q") == 2
    assert "the run's own model is in run/model" in capsys.readouterr().err
    assert call("apply", plan, "--out", "run/other", "-q") == 0
    assert {k: v for k, v in held(run).items() if "other" not in k} == before
    assert call("retrain", model, "--steps", "0", "-q") == 0


def test_weights_of_others_are_not_written_over(run: Path, capsys):
    Path("checkpoint").mkdir()
    Path("checkpoint/model.safetensors").write_bytes(b"theirs")
    assert call("apply", "run/plan.json", "--out", "checkpoint", "-q") == 2
    assert "has not written. Choose another --out" in capsys.readouterr().err
    assert held("checkpoint") == {"checkpoint/model.safetensors": b"theirs"}


def test_a_folder_in_use_is_not_written(run: Path, capsys):
    assert call("apply", str(run / "plan.json"), "--out", "built", "-q") == 0
    before = held(".")
    with locked(run):
        assert call("retrain", "run/model", "--steps", "0", "-q") == 5
        assert call("refresh", "run/model", "-q") == 5
        assert "run is in use" in capsys.readouterr().err
    with locked(Path("built")):
        for verb in ("apply run/plan.json --out built", "retrain built", "refresh built"):
            assert call(*verb.split(), "-q") == 5
    assert held(".") == before


def test_work_that_fails_leaves_no_new_folder(run: Path, capsys):
    for out in ("late", "some/where/late"):
        assert call("apply", "run/plan.json", "--task", "nothing", "--out", out, "-q") == 2
    assert call("refresh", "run/model", "--task", "toy:no_linear", "--out", "late", "-q") == 4
    assert {path.name for path in Path().iterdir()} == {"run"}
    Path("here").mkdir()
    assert call("apply", "run/plan.json", "--task", "nothing", "--out", "here", "-q") == 2
    assert Path("here").is_dir()


def test_a_plan_made_from_python_is_told_to_need_a_task(run: Path, capsys):
    bs.save(bs.apply(ToyTask().model(), replace(toy_plan(), task="toy")), "python")
    verbs = ("verify python", "retrain python", "refresh python", "apply python --out x")
    for verb in verbs:
        assert call(*verb.split(), "-q") == 2
        message = capsys.readouterr().err
        assert "this plan's task 'toy' was a Python object" in message
        assert "Give --task pkg.module:function" in message
    assert call("apply", "python", "--task", "toy", "--out", "x", "-q") == 2
    assert "unknown task 'toy'. Expected one of" in capsys.readouterr().err
    assert call("apply", "python", "--task", "toy:task", "--out", "x", "-q") == 0


def test_the_folder_of_a_run_is_told_from_the_one_of_its_model(run: Path, capsys):
    for verb in ("verify run", "retrain run --out x", "refresh run --out x"):
        assert call(*verb.split(), "-q") == 2
        message = capsys.readouterr().err
        assert "run is the folder of a run, expected one of a saved model" in message
        assert "run/model. Name that." in message
    (run / "model/model.safetensors").unlink()
    assert call("verify", "run", "-q") == 4
    assert "run/model.safetensors does not exist" in capsys.readouterr().err


def written(folder: str, *files: str) -> None:
    Path(folder).mkdir()
    for file in files:
        (Path(folder) / file).write_text("seeds: 3\n" if file == "config.yaml" else "")


@pytest.mark.parametrize("verb", ["report", "pareto"])
def test_a_folder_without_a_search_is_told_by_what_it_is(verb: str, capsys):
    written("finished", "config.yaml", "compare.md")
    written("begun", "config.yaml")
    written("table", "latency.csv")
    written("other")
    written("stopped", "config.yaml")
    Path("stopped/config.yaml").write_text("seed: 3\n")
    words = {
        "finished": "finished is the folder of a comparison",
        "begun": "Continue it with `blast-search compare --resume begun`.",
        "table": "`blast-search search --out table` begins one with the table's cells",
        "other": "Check the path.",
        "stopped": "Continue it with `blast-search search --resume stopped`.",
    }
    for folder, text in words.items():
        assert call(verb, folder) == 4
        message = capsys.readouterr().err
        assert text in message
        assert ("--resume" in message) == (folder in ("begun", "stopped"))
        assert ("Read finished/compare.md." in message) == (folder == "finished")


def test_a_path_is_no_model_module(run: Path, capsys):
    for verb in ("apply run/plan.json", "refresh run/model"):
        assert call(*verb.split(), "--model", "./make.py:model", "--out", "x") == 2
        message = capsys.readouterr().err
        assert "--model './make.py:model' is the path of a file" in message
        assert "Give make:model." in message


def test_the_help_says_what_goes_with_a_model(capsys):
    assert call("apply", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "the plan's own task; beside --model, none" in text
    assert "only a --task beside it gives calibration data" in text


def test_the_help_says_what_a_time_limit_does_not_cut(capsys):
    assert call("search", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "profiling and the last timing are not cut" in text
    assert "pkg.module:function, hf:FOLDER?text=FILE or shapes:NAME" in text


def test_a_model_module_that_exits_is_an_error(run: Path, monkeypatch, tmp_path: Path, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("script.py").write_text("import sys\nsys.exit(3)\n")
    assert call("apply", "run/plan.json", "--model", "script:make", "--out", "x") == 2
    assert "--model script:make: the module called sys.exit(3)" in capsys.readouterr().err
    for name in ("Block", "NoLinear.model"):
        assert call("apply", "run/plan.json", "--model", f"toy:{name}", "--out", "x") == 2
    told = capsys.readouterr().err
    assert "--model toy:Block failed: TypeError" in told
    assert "Expected a function without arguments" in told
    assert not Path("x").exists()
