"""Built-in task `vit`: a small vision transformer on Fashion-MNIST.

The model is trained once, from a fixed seed, and kept in the cache folder.  It is small on
purpose: plain SVD that keeps a tenth of its parameters costs it 3.6 points of accuracy, so what a
plan loses shows.  (Tried: 64 wide and 8 deep.  It answers to capacity more strongly, 10 points at
0.3, but on a CPU its layers are too small to get faster: no plan reached 0.6 of their latency.)
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from blast_search.batches import to_device
from blast_search.errors import IncompatibleInputError
from blast_search.files import cache_folder, write_bytes
from blast_search.tasks._support import data_bytes

CALIBRATION = 512  # images at the end of the training file, never used for training
IMAGE, CHANNEL_MEAN, CHANNEL_STD = 28, 0.286, 0.353  # pixels per side; statistics of all pixels

AUGMENTATION = "shift 1"  # what augmented_batches does


@dataclass(frozen=True)
class Recipe:
    """Shape and training of the model; a change of any field trains it anew."""

    width: int = 192
    depth: int = 3
    heads: int = 4
    patch: int = 7
    hidden: int = 768
    epochs: int = 6
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0


class Block(nn.Module):
    """Pre-norm transformer block on (B, T, width)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return out


class VisionTransformer(nn.Module):
    """Normalised images (B, 1, 28, 28) -> class logits (B, 10)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        tokens = (IMAGE // recipe.patch) ** 2
        self.embed = nn.Conv2d(1, recipe.width, recipe.patch, recipe.patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, recipe.width))
        self.blocks = nn.Sequential(
            *(Block(recipe.width, recipe.heads, recipe.hidden) for _ in range(recipe.depth))
        )
        self.norm = nn.LayerNorm(recipe.width)
        self.head = nn.Linear(recipe.width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 28, 28) -> (B, 10)."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


@cache
def images() -> dict[str, tuple[Tensor, Tensor]]:
    """training, calibration, evaluation -> images (N, 1, 28, 28) in fp32, labels (N,)."""
    with np.load(io.BytesIO(data_bytes("fashion.npz")), allow_pickle=False) as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}

    def part(name: str, rows: slice) -> tuple[Tensor, Tensor]:
        pixels = arrays[f"{name}_images"][rows].unsqueeze(1).float() / 255
        return (pixels - CHANNEL_MEAN) / CHANNEL_STD, arrays[f"{name}_labels"][rows].long()

    return {
        "training": part("train", slice(None, -CALIBRATION)),
        "calibration": part("train", slice(-CALIBRATION, None)),
        "evaluation": part("test", slice(None)),
    }


def augmented_batches(seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (images, labels) of the training part: each batch shifted by at most 1 pixel."""
    pictures, labels = images()["training"]
    generator = torch.Generator().manual_seed(seed)
    border = float(pictures.min())
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for rows in order.tensor_split(tuple(range(batch_size, len(order), batch_size))):
            if len(rows) < batch_size:
                continue
            batch = pictures[rows]
            down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
            padded = functional.pad(batch, (1, 1, 1, 1), value=border)
            yield padded[..., down : down + IMAGE, right : right + IMAGE], labels[rows]


def train(recipe: Recipe) -> VisionTransformer:
    """Train from the recipe's seed on CPU, with a progress line on stderr (minutes)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = VisionTransformer(recipe)
    steps = recipe.epochs * (len(images()["training"][1]) // recipe.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.1
    )
    batches = augmented_batches(recipe.seed, recipe.batch_size)
    started = time.monotonic()
    for step in range(1, steps + 1):
        pictures, labels = next(batches)
        loss = functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps:
            left = (time.monotonic() - started) / step * (steps - step)
            print(
                f"\rtraining the ViT once: {step}/{steps}, loss {float(loss.detach()):.3f}, "
                f"{left:.0f} s left   ",
                end="\n" if step == steps else "",
                file=sys.stderr,
                flush=True,
            )
    return model.eval()


def trained_file(recipe: Recipe) -> Path:
    """The safetensors file of the trained model in the cache, trained on the first call."""
    # AUGMENTATION is in the key as well: a model of another one is another model.
    text = json.dumps({**asdict(recipe), "augmentation": AUGMENTATION}, sort_keys=True)
    key = text.encode() + data_bytes("fashion.npz")
    digest = hashlib.sha256(key).hexdigest()
    path = cache_folder() / f"vit-fashion-{digest[:12]}.safetensors"
    if not path.is_file():
        write_bytes(path, save(train(recipe).state_dict()))
    return path


class ViTTask:
    """Accuracy of a small vision transformer on 3,000 Fashion-MNIST test images."""

    name = "vit"
    metric = ("accuracy", True)
    train_steps = 200
    learning_rate = 1e-3
    batch_size = 128

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = recipe or Recipe()

    def model(self) -> nn.Module:
        """A new VisionTransformer: fp32, CPU, eval mode; the first call trains it (minutes).

        Raises:
            IncompatibleInputError: the file in the cache is damaged.
        """
        model = VisionTransformer(self.recipe)
        path = trained_file(self.recipe)
        try:
            model.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise IncompatibleInputError(
                f"the cached model {path} is damaged ({str(error).splitlines()[0]}). "
                "Delete the file; the next run trains it again."
            ) from error
        return model.eval()

    def workload(self) -> Tensor:
        """128 images: every Linear layer of the blocks sees 128 x 16 = 2,048 tokens."""
        return images()["calibration"][0][:128].clone()

    def calibration(self) -> list[Tensor]:
        """512 images in 8 batches of 64."""
        return list(images()["calibration"][0].tensor_split(8))

    def evaluate(self, model: nn.Module) -> float:
        """Share of right answers; an answer that is not finite is wrong."""
        pictures, labels = images()["evaluation"]
        right = 0
        with torch.no_grad():
            for start in range(0, len(labels), 250):
                logits = model(to_device(pictures[start : start + 250], model)).cpu()
                found = logits.argmax(-1) == labels[start : start + 250]
                right += int((found & logits.isfinite().all(-1)).sum())
        return right / len(labels)

    def train_batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless augmented (images, labels), 128 rows each."""
        return augmented_batches(seed, self.batch_size)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], teacher: nn.Module) -> Tensor:
        """KL(teacher || model) in nats per image.

        No label term: it would train the short-trained teacher's pupil past its teacher, and
        hide what the compression cost.
        """
        pictures, _ = batch
        with torch.no_grad():
            wanted = teacher(to_device(pictures, teacher)).float().log_softmax(-1)
        found = model(to_device(pictures, model)).float().log_softmax(-1)
        return functional.kl_div(found, wanted, log_target=True, reduction="batchmean")


def task() -> ViTTask:
    """The task that `--task vit` names."""
    return ViTTask()
