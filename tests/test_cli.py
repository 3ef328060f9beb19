"""The command line: the two-step user story, exit codes, and messages for bad input."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from command import call

from blast_search import cli
from blast_search.errors import FallbackWarning
from blast_search.files import locked
from blast_search.options import emit

TOY = ["--task", "toy:task", "--workers", "local", "--space", "quick", "-q"]
SMALL = [*TOY, "--task", "toy:shallow", "--trials", "2", "--retrain-steps", "2"]


@pytest.fixture(autouse=True)
def _tasks(workplace, monkeypatch, project: Path) -> None:
    monkeypatch.syspath_prepend(str(project / "tests"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, project_path=Path(__file__).parent) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    sys.path.insert(0, str(project_path))
    assert call("--budget", "0.8", *SMALL, "--out", str(out)) == 0
    return out


def test_the_bare_command_is_a_search(run: Path):
    assert (run / "plan.json").is_file()


def test_json_on_stdout_is_one_object(tmp_path: Path, capfd):
    arguments = [*SMALL, "--trials", "1", "--retrain-steps", "0", "--out", str(tmp_path / "r")]
    assert call("search", "--budget", "0.9", "--json", *arguments) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["plan"]["measured"]["met_budget"] is True


def test_pareto_and_another_plan_without_measuring(run: Path, capsys):
    before = (run / "measured.csv").read_text()
    assert call("pareto", str(run)) == 0
    shown = capsys.readouterr().out
    assert "searched" in shown
    assert " *" in shown
    assert call("pareto", str(run), "--at", "0.9", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["predicted"]["latency_ratio_layers"] <= 0.9
    assert call("pareto", str(run), "--csv") == 0
    assert capsys.readouterr().out.startswith("name,predicted_layer_latency_ratio")
    assert call("pareto", str(run), "--plot", "front.png") == 0
    assert Path("front.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "measured.csv").read_text() == before
    assert call("pareto", str(run), "--at", "0.0001") == 3


def test_apply_retrain_verify(run: Path, capsys):
    assert call("apply", str(run / "plan.json"), "--out", "built", "-q") == 0
    assert call("retrain", "built", "--steps", "2", "-q", "--out", "trained") == 0
    assert call("verify", "trained", "--seconds", "1", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["latency_ratio_layers"] < 3
    assert result["macs_ratio"] < 1
    assert result["budget"] == {
        "value": 0.8, "scope": "layers", "max_drop": None,
        "met": result["latency_ratio_layers"] <= 0.8,
    }  # fmt: skip
    assert call("verify", str(run / "model"), "--seconds", "1", "-q") == 0
    assert "budget 0.8 (scope layers): m" in capsys.readouterr().out


def test_apply_by_model_function(run: Path):
    Path("mymodel.py").write_text("import toy\n\ndef make():\n    return toy.shallow().model()\n")
    plan = str(run / "plan.json")
    assert call("apply", plan, "--model", "mymodel:make", "--out", "m", "-q") == 0
    assert call("apply", plan, "--model", "mymodel:none", "--out", "m", "-q") == 2


def test_profile_dry_run_and_resume(tmp_path: Path, capsys):
    folder = str(tmp_path / "p")
    base = ["profile", *TOY]
    assert call(*base, "--dry-run", "--json") == 0
    forecast = json.loads(capsys.readouterr().out)
    assert forecast["cells"] < forecast["cells_without_sharing"]
    assert forecast["cells_to_measure"] == forecast["cells"]
    assert call(*base, "--out", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["cells"] == forecast["cells"]
    rows = Path(folder, "latency.csv").read_text()
    assert call(*base, "--out", folder) == 0
    assert Path(folder, "latency.csv").read_text() == rows
    assert "latency.csv" in capsys.readouterr().out
    assert call(*base, "--out", folder, "--dry-run", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["cells_on_file"] == forecast["cells"]
    assert again["cells_to_measure"] == 0
    assert call(*base, "--out", folder, "--dry-run") == 0  # TOY has -q: results are printed
    shown = capsys.readouterr().out
    assert "cells to measure             0" in shown
    assert "profiling alone" in shown


def test_a_dry_run_subtracts_what_a_resumed_run_skips(run: Path, capsys):
    fresh = ["search", "--budget", "0.8", *SMALL, "--dry-run"]
    assert call(*fresh, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert first["trials"] == 2
    assert first["cells_are_at_most"] is False
    assert call("search", "--resume", str(run), "--dry-run", "--json", "-q") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["cells_on_file"] == again["cells"] == first["cells"]
    probes = len((run / "probes.csv").read_text().split("\nprobe,")) - 1
    assert again["probes_on_file"] == probes > 0
    assert again["probes"] == first["probes"] - probes
    assert (
        again["measurements_on_file"] == len((run / "measured.csv").read_text().splitlines()) - 1
    )
    copy = Path(shutil.copytree(run, "copied"))
    (copy / "study.db").unlink(missing_ok=True)
    study = optuna.create_study(storage=f"sqlite:///{copy / 'study.db'}")
    study.tell(study.ask(), 1.0)
    assert call("search", "--resume", str(copy), "--dry-run", "--json", "-q") == 0
    assert json.loads(capsys.readouterr().out)["trials"] == 1
    (copy / "study.db").write_text("no database")
    assert call("search", "--resume", str(copy), "--dry-run", "-q") == 4
    assert "study.db is no study" in capsys.readouterr().err
    loud = [word for word in fresh if word != "-q"]
    assert call(*loud, "--profile", "pruned") == 0
    assert f"at most {first['cells']}" in capsys.readouterr().out


def test_config_file_and_overriding_flags(capsys):
    Path("c.yaml").write_text("task: toy:task\nbudget: 7\nspace: quick\nworkers: local\n")
    assert call("search", "--config", "c.yaml", "--dry-run") == 2
    assert "budget is 7" in capsys.readouterr().err
    assert call("search", "--config", "c.yaml", "--budget", "0.5", "--dry-run") == 0
    Path("c.yaml").write_text("tusk: toy:task\n")
    assert call("search", "--config", "c.yaml") == 4
    message = capsys.readouterr().err
    assert "unknown key tusk" in message
    assert "on the command line only" not in message
    Path("c.yaml").write_text("budget: 0.5\nquiet: true\n")
    assert call("search", "--config", "c.yaml") == 4
    assert "json, quiet, verbose, dry_run, resume stand on the command line only" in (
        capsys.readouterr().err
    )


def test_block_counts_that_divide_no_layer_are_a_warning(capsys):
    Path("seven.yaml").write_text("num_blocks: [7]\n")
    with pytest.warns(FallbackWarning, match=r"\[7\].*divides none.*only low rank"):
        assert call("--budget", "0.3", *TOY, "--space", "seven.yaml", "--dry-run") == 0
    line = cli._format_warning("text", FallbackWarning, "file", 1)
    assert line == "warning: text\n"


def test_workload_option(capsys):
    base = ["search", "--budget", "0.5", *TOY, "--dry-run", "--json", "--workload"]
    assert call(*base, "prefill:2x32,decode:4x1@0.7") == 0
    two = json.loads(capsys.readouterr().out)["cells"]
    assert call(*base, "2x32") == 0
    assert json.loads(capsys.readouterr().out)["cells"] * 2 == two
    assert call(*base, "2by32") == 2


def test_report_tasks_doctor_version(run: Path, capsys):
    assert call("report", str(run), "--price-per-hour", "2.5") == 0
    assert call("tasks") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("minilm", "pkg.module:", "hf:FOLDER", "shapes:NAME"))
    assert call("tasks", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed["tasks"]) == {"minilm", "smollm2", "vit"}
    assert all(f"{form}:" in str(listed["other_forms"]) for form in ("hf", "shapes", "module"))
    assert call("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["noise"]["median_us"] > 0
    cli.main(["--version"])
    assert capsys.readouterr().out.strip() == "0.1.0"


CASES = {
    "budget above one": (["--budget", "1.5", *TOY], 2, "expected a fraction"),
    "budget zero": (["--budget", "0", *TOY], 2, "budget is 0"),
    "no budget": (["search", *TOY], 2, "give --budget"),
    "not a number": (["--budget", "much", *TOY], 2, "--budget"),
    "unknown option": (["--bugdet", "0.3"], 2, "bugdet"),
    "unknown verb": (["serch"], 2, "serch"),
    "unknown task": (["--budget", "0.3", "--task", "bert"], 2, "minilm"),
    "no such function": (["--budget", "0.3", "--task", "toy:nothing"], 2, "nothing"),
    "not a task": (["--budget", "0.3", "--task", "toy:not_a_task"], 2, "not_a_task"),
    "unknown space": (["--budget", "0.3", "--task", "toy:task", "--space", "big"], 2, "default"),
    "unknown scope": (["--budget", "0.3", "--budget-scope", "disk", *TOY], 2, "layers"),
    "each workload's memory": (
        ["--budget", "0.3", "--every-workload", "--budget-scope", "params", *TOY],
        2,
        "layers",
    ),
    "workloads of one name": (
        ["--budget", "0.3", *TOY, "--workload", "a:1x8,a:2x8"],
        2,
        "two parts named a",
    ),
    "unknown dtype": (["--budget", "0.3", "--dtype", "int3", *TOY], 2, "float32"),
    "unknown device": (["--budget", "0.3", "--device", "tpu", *TOY], 2, "cuda"),
    "unknown workers": (["--budget", "0.3", *TOY, "--workers", "dask"], 2, "local"),
    "broken yaml": (["--budget", "0.3", *TOY, "--space", "broken.yaml"], 4, "not valid YAML"),
    "unknown key": (["--budget", "0.3", *TOY, "--space", "key.yaml"], 4, "unknown key 'blocks'"),
    "impossible blocks": (["--budget", "0.3", *TOY, "--space", "seven.yaml"], 4, "divides none"),
    "no linear layer": (["--budget", "0.3", *TOY, "--task", "toy:no_linear"], 4, "no Linear"),
    "nan weights": (["--budget", "0.3", *TOY, "--task", "toy:nan_weights"], 4, "blocks.1.fc2"),
    "bad workload": (
        ["--budget", "0.3", *TOY, "--task", "toy:bad_workload"],
        4,
        "cannot be called",
    ),
    "endless": (["--budget", "0.3", *TOY, "--time-limit", "inf"], 2, "time_limit is inf"),
    "endless budget": (["--budget", "nan", *TOY], 2, "budget is nan"),
    "endless drop": (["--max-drop", "inf", *TOY], 2, "max_drop is inf"),
    "negative seed": (["--budget", "0.3", *TOY, "--seed", "-1"], 2, "seed is -1"),
    "task that fails": (["--budget", "0.3", *TOY, "--task", "fails:task"], 2, "NameError: name"),
    "task that breaks": (["--budget", "0.3", *TOY, "--task", "breaks:task"], 1, "KeyError: 'x'"),
    "trials of text": (["--config", "text.yaml", *TOY], 2, "retrain_steps is '20', expected a"),
    "task of many lines": (
        ["--budget", "0.3", *TOY, "--task", "many:task"],
        1,
        "first second (",
    ),
    "resume nothing": (["--resume", "nowhere"], 2, "no run to resume"),
    "pareto nowhere": (["pareto", "nowhere"], 2, "no run folder"),
    "plan missing": (["apply", "none.json", "--out", "x"], 4, "does not exist"),
    "plan a pickle": (["apply", "pickle.json", "--out", "x"], 4, "pickle.json"),
    "plan truncated": (["apply", "cut.json", "--out", "x"], 4, "cut.json"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, tmp_path: Path, capsys, run: Path):
    Path("broken.yaml").write_text("num_blocks: [1, 2")
    Path("key.yaml").write_text("blocks: [1]")
    Path("seven.yaml").write_text("num_blocks: [7]\nuniform: true")
    Path("text.yaml").write_text("budget: 0.3\nretrain_steps: '20'")
    Path("fails.py").write_text("task = nowhere\n")
    Path("breaks.py").write_text("def task():\n    return {}['x']\n")
    Path("many.py").write_text("def task():\n    raise RuntimeError('first\\n\\n  second')\n")
    Path("pickle.json").write_bytes(pickle.dumps({"a": 1}))
    Path("cut.json").write_bytes((run / "plan.json").read_bytes()[:900])
    arguments, code, text = CASES[case]
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert call(*arguments) == code
    message = capsys.readouterr().err
    assert text in message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 3
    assert sorted(p.name for p in tmp_path.rglob("*")) == before, "something was written"


def test_a_usage_error_is_one_line_that_names_the_help(capsys):
    assert call("--bugdet", "0.3") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: No such option: --bugdet")
    assert line.endswith("See `blast-search search --help`.")
    assert call("apply", "plan.json") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: Missing option '--out'. See `blast-search apply --help`."
    assert call() == 2
    assert "Commands:" in capsys.readouterr().err
    assert call("search", "--help") == 0
    assert "--budget" in capsys.readouterr().out


LOUD = """import os
import ctypes
import sys
import toy

class Loud(toy.Shallow):
    kept = sys.__stdout__

    def evaluate(self, model):
        print("from Python", flush=True)
        os.system("echo from a process")
        ctypes.CDLL(None).puts(b"from C")
        self.kept.write("from who kept it")
        return super().evaluate(model)

class Broken(toy.Shallow):
    def evaluate(self, model):
        print("before the end")
        raise EOFError("no more\\ndata")

def loud():
    return Loud()

def broken():
    return Broken()
"""


def test_json_is_all_there_is_on_stdout_whatever_a_task_prints(run: Path):
    Path("prints.py").write_text(LOUD)
    command = [sys.executable, "-m", "blast_search.cli", "retrain", str(run / "model"), "--json"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(cli.__file__).parents[1]), *sys.path])
    }
    options = {"env": env, "capture_output": True, "text": True}
    tail = ["--steps", "0", "--out", "trained", "--task"]
    done = subprocess.run([*command, *tail, "prints:loud"], **options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 0
    for words in ("from Python", "from a process", "from C", "from who kept it"):
        assert words in done.stderr
    done = subprocess.run([*command, *tail, "prints:broken", "-v"], **options)
    assert done.returncode == 1
    error = json.loads(done.stdout)
    assert error["exit_code"] == 1
    assert error["error"].startswith("EOFError: no more data (")
    assert "before the end" in done.stderr
    assert "Traceback" in done.stderr


def test_json_of_errors_and_of_what_is_no_number(capsys):
    assert call("pareto", "nowhere", "--json") == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {
        "error": "nowhere is no run folder. Check the path (results/<run>).", "exit_code": 2,
    }  # fmt: skip
    assert shown.err.startswith("error: nowhere is no run folder")
    assert call("serch", "--json") == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2
    emit({"a": [float("nan"), {"b": float("-inf")}, (1.5, None)]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, {"b": None}, [1.5, None]]}


VERBS = {
    "apply": ["apply", "PLAN", "--out", "x"],
    "retrain": ["retrain", "MODEL"],
    "refresh": ["refresh", "MODEL", "--out", "x"],
    "verify": ["verify", "MODEL"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_advice_of_v_works_for_every_verb(verb: str, run: Path, capsys):
    Path("breaks.py").write_text(
        "import toy\n\nclass T(toy.ToyTask):\n    def model(self):\n        return {}['x']\n\n"
        "def task():\n    return T()\n"
    )
    places = {"PLAN": str(run / "plan.json"), "MODEL": str(run / "model")}
    arguments = [places.get(word, word) for word in VERBS[verb]]
    assert call(*arguments, "--task", "breaks:task", "-q") == 1
    message = capsys.readouterr().err
    assert "With -v the whole traceback is shown" in message
    assert "Traceback" not in message
    assert call(*arguments, "--task", "breaks:task", "-qv") == 1
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert "With -v" not in message


def test_nan_in_calibration_data(capsys):
    arguments = ["--budget", "0.3", *TOY, "--task", "toy:nan_calibration", "--out", "r"]
    assert call(*arguments) == 4
    assert "calibration batch 1 is not finite" in capsys.readouterr().err


def test_edited_plan_and_plan_for_another_model(run: Path, capsys):
    text = (run / "plan.json").read_text()
    Path("edited.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    assert call("apply", "edited.json", "--out", "x") == 4
    assert "sha256" in capsys.readouterr().err
    Path("other.py").write_text(
        "import toy\n\nclass T(toy.ToyTask):\n    def model(self):\n"
        "        return toy.Net(depth=1).eval()\n\ndef task():\n    return T()\n"
    )
    assert call("apply", str(run / "plan.json"), "--task", "other:task", "--out", "x") == 4
    assert "another model" in capsys.readouterr().err


def test_pickle_where_safetensors_is_expected(run: Path, capsys):
    shutil.copytree(run / "model", "m")
    Path("m/model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    assert call("verify", "m") == 4
    assert "never reads pickles" in capsys.readouterr().err


def test_run_folder_in_use(run: Path, capsys):
    with locked(run):
        assert call("--resume", str(run), "-q") == 5
    assert "in use" in capsys.readouterr().err


def test_resume_takes_the_runs_own_options(run: Path, capsys):
    assert call("--resume", str(run), "--budget", "0.4") == 2
    assert "budget cannot change" in capsys.readouterr().err


def test_unwritable_folder(capsys):
    Path("file").write_text("")
    assert call("--budget", "0.5", *SMALL, "--out", "file/run") == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_resumable_run(number, code, tmp_path: Path, project: Path):
    env = os.environ | {"PYTHONPATH": f"{project}:{project / 'tests'}"}
    command = [sys.executable, "-m", "blast_search.cli"]
    process = subprocess.Popen(
        [*command, "--budget", "0.8", *SMALL, "--out", "r"],
        env=env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not Path("r/latency.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code, message
    assert "--resume" in message
    assert "Traceback" not in message
    if number == signal.SIGINT:  # what is left is the same
        done = subprocess.run([*command, "--resume", "r", "-q", "--workers", "local"], env=env)
        assert done.returncode == 0


def test_doctor_prints_to_a_person(capsys):
    assert call("doctor") == 0
    shown = capsys.readouterr().out
    assert "kernels:" in shown
    assert "torch:" in shown


def test_a_damaged_run_folder_is_told_by_name(run: Path, capsys):
    copy = Path(shutil.copytree(run, "damaged"))
    (copy / "latency.csv").unlink()
    assert call("pareto", str(copy), "--at", "0.9") == 4
    assert "has no latency.csv" in capsys.readouterr().err
    text = (copy / "front.csv").read_text()
    (copy / "front.csv").write_text(text.replace("0.", "O.", 1))
    assert call("pareto", str(copy)) == 4
    assert "expected a number" in capsys.readouterr().err
    (copy / "plan.json").write_text('{"schema_version": 1, "task": 1e999}')
    assert call("apply", str(copy / "plan.json"), "--out", "x") == 4
    assert "1e999" in capsys.readouterr().err
