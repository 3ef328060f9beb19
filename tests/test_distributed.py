"""Retraining by two processes under torchrun is that of one whose batches are twice as large."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import call
from torch import Tensor, nn
from toy import Net, ToyTask

import blast_search as bs

COMMAND = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Halves(ToyTask):
    """A step of two processes sees what a step of one process sees."""

    name = "halves"
    metric = ("distance", False)
    size = 8
    learning_rate = 3e-5

    def __init__(self) -> None:
        super().__init__()
        self.data = self.data.double()

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Net(depth=1).double().eval()

    def evaluate(self, model: nn.Module) -> float:
        return float(self.loss(model, self.data[32:64], self.model()).detach())

    def train_batches(self, seed: int) -> Iterator[Tensor]:
        for start in range(64, 96, self.size):
            yield self.data[start : start + self.size]


class Whole(Halves):
    size = 16


class Failing(Halves):
    """The second process alone has a batch without a loss."""

    def loss(self, model: nn.Module, batch: Tensor, teacher: nn.Module) -> Tensor:
        loss = super().loss(model, batch, teacher)
        return loss.detach() if os.environ.get("RANK") == "1" else loss


def halves() -> Halves:
    return Halves()


def failing() -> Failing:
    return Failing()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    task = Halves()
    plan = bs.uniform_plan(task.model(), task.workload(), num_blocks=2, keep=0.1)
    model = bs.apply(task.model(), plan, calibration=task.calibration())
    bs.save(model, tmp_path / "applied", plan)
    return tmp_path / "applied"


def launched(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = f"{project}:{project / 'tests'}"
    return subprocess.run(
        [sys.executable, *COMMAND, "-m", "blast_search.cli", "retrain", *arguments],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_two_processes_make_the_steps_of_one_with_larger_batches(folder: Path, project: Path):
    out = folder.parent / "together"
    task = ("--task", "test_distributed:halves", "--steps", "8", "--out", str(out), "--json")
    done = launched(project, str(folder), *task)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one object, of the first process
    assert told["processes"] == 2
    assert told["steps"] == 8
    assert told["kept"]
    together = bs.load(out, Halves().model)
    alone = bs.load(folder, Halves().model)
    before = {name: p.detach().clone() for name, p in alone.named_parameters()}
    losses = bs.retrain(Whole(), alone, Whole().model(), 8)
    assert losses[-1] < losses[0]
    for name, wanted in alone.named_parameters():
        moved = (wanted - before[name]).norm()
        assert (together.get_parameter(name) - wanted).norm() <= 1e-6 * moved, name


def test_where_one_process_fails_all_end_and_nothing_is_changed(folder: Path, project: Path):
    weights = (folder / "model.safetensors").read_bytes()
    out = folder.parent / "new"
    done = launched(project, str(folder), "--task", "test_distributed:failing", "--out", str(out))
    assert done.returncode != 0
    assert "without a gradient" in done.stderr
    assert (folder / "model.safetensors").read_bytes() == weights
    assert not out.exists()


def test_one_process_alone_says_so(folder: Path, capsys: pytest.CaptureFixture[str]):
    task = ("--task", "test_distributed:halves", "--steps", "1", "--json")
    assert call("retrain", str(folder), *task) == 0
    assert json.loads(capsys.readouterr().out)["processes"] == 1
