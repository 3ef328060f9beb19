"""A task of your own: a plain PyTorch model, its data, and the batch to be fast for.

    blast-search --task examples.own_task:task --budget 0.5

The model is a residual network that tells noisy clusters apart; it trains here in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, CLASSES = 256, 40


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class Clusters:
    """The Task protocol: no base class needed."""

    name = "clusters"
    metric = ("accuracy", True)
    train_steps = 60

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.centres = torch.randn(CLASSES, WIDTH, generator=generator) / 4
        self._weights: dict[str, Tensor] = {}

    def _batch(self, seed: int, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, CLASSES, (size,), generator=generator)
        return self.centres[labels] + torch.randn(size, WIDTH, generator=generator), labels

    def model(self) -> nn.Module:
        """A fresh copy of the trained model; your task would load a checkpoint here."""
        torch.manual_seed(0)
        model = Classifier()
        if not self._weights:
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
            for step in range(80):
                x, labels = self._batch(10_000 + step, 128)
                optimizer.zero_grad()
                F.cross_entropy(model(x), labels).backward()
                optimizer.step()
            self._weights = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self._weights)
        return model.eval()

    def workload(self) -> Tensor:
        return self._batch(1, 512)[0]

    def calibration(self) -> list[Tensor]:
        return [self._batch(seed, 256)[0] for seed in range(100, 104)]

    def evaluate(self, model: nn.Module) -> float:
        x, labels = self._batch(2, 4000)
        return float((model(x).argmax(-1) == labels).float().mean())

    def train_batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            seed += 1
            yield self._batch(1_000_000 + seed, 128)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], teacher: nn.Module) -> Tensor:
        with torch.no_grad():
            wanted = teacher(batch[0]).log_softmax(-1)
        found = model(batch[0]).log_softmax(-1)
        return F.kl_div(found, wanted, log_target=True, reduction="batchmean")


def task() -> Clusters:
    return Clusters()
