"""A task small enough for tests: a residual network of Linear layers on correlated data."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

WIDTH = 256  # with 16 x 16 tokens, layers take much longer than the overhead of a call


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = WIDTH, depth: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class ToyTask:
    """Agreement with the dense model's classes."""

    name = "toy"
    metric = ("agreement", True)
    train_steps = 4

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(WIDTH, WIDTH, generator=generator) * torch.linspace(1, 0, WIDTH)
        self.data = torch.randn(96, 16, WIDTH, generator=generator) @ mix / 6

    def model(self) -> nn.Module:
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        model = Net().eval()
        torch.random.set_rng_state(state)
        return model

    def workload(self) -> Tensor:
        return self.data[:16]

    def make_workload(self, batch_size: int, length: int) -> Tensor:
        return torch.zeros(batch_size, length, WIDTH)

    def calibration(self) -> list[Tensor]:
        return [self.data[:16], self.data[16:32]]

    def evaluate(self, model: nn.Module) -> float:
        x = self.data[32:64]
        return float((model(x).argmax(-1) == self.model()(x).argmax(-1)).float().mean())

    def train_batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.data[64 + torch.randint(0, 32, (8,), generator=generator)]

    def loss(self, model: nn.Module, batch: Tensor, teacher: nn.Module) -> Tensor:
        with torch.no_grad():
            wanted = teacher(batch)
        return (model(batch) - wanted).square().mean()


class Shallow(ToyTask):
    """The toy task on one block of half the width: the least whose latency is no noise."""

    def __init__(self) -> None:
        super().__init__()
        self.data = self.data[..., : WIDTH // 2].contiguous()

    def model(self) -> Net:
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        model = Net(WIDTH // 2, depth=1).eval()
        torch.random.set_rng_state(state)
        return model


def task() -> ToyTask:
    return ToyTask()


def shallow() -> Shallow:
    return Shallow()


class NoLinear(ToyTask):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(WIDTH))


def no_linear() -> ToyTask:
    return NoLinear()


class NanWeights(ToyTask):
    def model(self) -> nn.Module:
        model = super().model()
        with torch.no_grad():
            model.blocks[1].fc2.weight[0, 0] = float("nan")  # type: ignore[index,union-attr]
        return model


def nan_weights() -> ToyTask:
    return NanWeights()


class NanCalibration(ToyTask):
    def calibration(self) -> list[Tensor]:
        batches = [b.clone() for b in super().calibration()]
        batches[1][0, 0, 0] = float("nan")
        return batches


def nan_calibration() -> ToyTask:
    return NanCalibration()


class BadWorkload(ToyTask):
    def workload(self) -> Tensor:
        return torch.zeros(2, 3, WIDTH + 1)


def bad_workload() -> ToyTask:
    return BadWorkload()


def not_a_task() -> int:
    return 3


if os.environ.get("TOY_LOG"):
    # Counts what a run measures, for the tests of resuming.
    from pathlib import Path

    _evaluate = ToyTask.evaluate

    def _logged(self: ToyTask, model: nn.Module) -> float:
        with Path(os.environ["TOY_LOG"]).open("a") as stream:
            stream.write("evaluate\n")
        return _evaluate(self, model)

    ToyTask.evaluate = _logged  # type: ignore[method-assign]
