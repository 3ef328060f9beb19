"""How the command line ends: by a signal, a closed pipe, a task that exits, and what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import call

from blast_search import cli, pipeline
from blast_search.errors import InfeasibleBudgetError
from blast_search.plan import LayerPlan, Plan

SEARCH = ["search", "--budget", "0.5", "--task", "toy:task", "--workers", "local", "-q"]
COMMAND = "import blast_search_command as c; c.main()"


pytestmark = pytest.mark.usefixtures("workplace")


def environment(project: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{project}:{project / 'tests'}"}


MODULES = {
    "imports": "import sys\nsys.exit(0)\n",
    "function": "import sys\n\ndef task():\n    sys.exit(0)\n",
    "model": "import sys, toy\n\nclass T(toy.ToyTask):\n    def model(self):\n"
    "        sys.exit('no more')\n\ndef task():\n    return T()\n",
}


def test_a_task_that_exits_is_an_error(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in MODULES.items():
        Path(f"exits_{name}.py").write_text(text)
    assert call(*SEARCH, "--task", "exits_imports:task") == 2
    message = capsys.readouterr().err
    assert "'exits_imports' of the task 'exits_imports:task' called sys.exit(0)" in message
    assert "__main__" in message
    assert call(*SEARCH, "--task", "exits_function:task", "--json") == 1
    assert json.loads(capsys.readouterr().out)["error"].startswith("SystemExit: 0 (")
    assert call(*SEARCH, "--task", "exits_model:task") == 1
    assert "SystemExit: no more (" in capsys.readouterr().err


ENDS = {
    "a signal": (cli.Stopped(signal.SIGINT), 130),
    "no plan": (InfeasibleBudgetError("no plan meets budget 0.5"), 3),
    "a failure": (KeyError("x"), 1),
}


@pytest.mark.parametrize("verb", ["search", "compare"])
@pytest.mark.parametrize("end", ENDS)
def test_what_ends_a_run_names_its_folder(end: str, verb: str, monkeypatch, capsys):
    def fail(self: pipeline.Pipeline) -> None:
        raise error

    error, code = ENDS[end]
    monkeypatch.setattr(pipeline.Pipeline, "measured", fail)
    arguments = [verb, *(word for word in SEARCH[1:] if word != "-q"), "--out", "r"]
    assert call(*arguments, "--json") == code
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told["run"] == "r"
    assert told["exit_code"] == code
    assert shown.err.count("run folder: r") == 1
    advice = f"continue with `blast-search {verb} --resume r`"
    assert (advice in told["error"]) == (code != 3)


@pytest.mark.parametrize("form", [["--json"], ["-q"]])
def test_the_nearest_plan_to_a_budget_out_of_reach_is_shown(form: list[str], monkeypatch, capsys):
    def fail(self: pipeline.Pipeline) -> None:
        measured = {"latency_ratio_layers": 0.7, "latency_ratio_model": 0.8, "met_budget": False}
        layers = {"fc": LayerPlan("blast", 2, 8, 64, 64)}
        budget = {"value": 0.5, "scope": "layers"}
        plan = Plan({}, layers, budget=budget, measured=measured, search={"verdict": "As it is."})
        plan.save(self.folder / "plan.json")
        raise InfeasibleBudgetError("no plan meets budget 0.5")

    monkeypatch.setattr(pipeline.Pipeline, "measured", fail)
    assert call(*(word for word in SEARCH if word != "-q"), "--out", "r", *form) == 3
    shown = capsys.readouterr().out
    if form == ["--json"]:
        told = json.loads(shown)
        assert (told["run"], told["exit_code"]) == ("r", 3)
        assert told["plan"]["measured"]["latency_ratio_layers"] == 0.7
    else:
        assert "searched plan" in shown
        assert "0.700" in shown
        assert "Budget missed." in shown


def test_other_verbs_do_not_speak_of_a_run(monkeypatch, capsys):
    def stop(*arguments: object) -> None:
        raise cli.Stopped(signal.SIGTERM)

    monkeypatch.setattr("blast_search.saved.verify", stop)
    assert call("verify", "some", "--json") == 143
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": "Stopped.", "exit_code": 143}
    assert shown.err.strip() == "Stopped."


SWALLOWS = """
import os, signal, time, toy

class T(toy.Shallow):
    def evaluate(self, model):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(9)
        except BaseException:  # as other code may do, around an import for instance
            return super().evaluate(model)

def task():
    return T()
"""


def test_a_signal_that_was_swallowed_ends_the_run_at_the_next_step(project: Path):
    Path("swallows.py").write_text(SWALLOWS)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *SEARCH, "--task", "swallows:task", "--out", "r"],
        env=environment(project), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Stopped." in done.stderr
    assert "continue with" in done.stderr
    assert len(Path("r/latency.csv").read_text().splitlines()) == 2  # a cell


def test_a_signal_while_pytorch_is_imported_is_no_traceback(project: Path):
    slow = "import os, time; os.write(1, b'x'); time.sleep(60)"
    Path("torch.py").write_text(slow)  # found before the real one
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "tasks"], env=environment(project) | {"PYTHONPATH":
        f"{Path.cwd()}:{project}"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.read(1) == b"x"
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 130
    assert message == b""


@pytest.mark.parametrize("form", [["--json"], []])
def test_a_closed_pipe_is_no_error(form: list[str], project: Path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "tasks", *form], env=environment(project), stdout=write,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch, capfd):
    def broken() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    code = cli.run_guarded(broken)
    assert code == 1
    assert "Broken pipe" in capfd.readouterr().err
