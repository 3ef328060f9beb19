"""Train a small vision transformer from scratch, dense and with BLAST layers, side by side.

    python -m examples.train_vit
    python -m examples.train_vit --blocks 8 --keep 0.3 --steps 1000

Fashion-MNIST (10,752 training and 3,000 test images ship with blast-search).  All contenders
see the same batches and take turns at every step, so that their times compare.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import blast_search as bs
from blast_search.evaluate import count_macs, count_params
from blast_search.layers import Workload
from blast_search.tasks.vit import Recipe, VisionTransformer, augmented_batches, images

BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, WARMUP = 64, 2e-3, 0.01, 0.1


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return VisionTransformer(Recipe(width=192, depth=3, heads=4, hidden=768))


def contenders(seed: int, blocks: int, keep: float) -> dict[str, nn.Module]:
    """The dense model, and the same with BLAST layers that were never dense weights."""
    batch = images()["training"][0][:1]
    plan = bs.uniform_plan(build(seed), batch, num_blocks=blocks, keep=keep)
    return {"dense": build(seed), "blast": bs.from_scratch(build(seed), plan)}


def train(models: dict[str, nn.Module], steps: int, seed: int) -> dict[str, dict[str, Any]]:
    """Train all models on equal batches; returns, for each, the columns of the table."""
    optimizers, schedules = {}, {}
    for name, model in models.items():
        groups = bs.parameter_groups(model, LEARNING_RATE, WEIGHT_DECAY)
        optimizers[name] = torch.optim.AdamW(groups)
        schedules[name] = torch.optim.lr_scheduler.OneCycleLR(
            optimizers[name], [g["lr"] for g in groups], total_steps=steps, pct_start=WARMUP
        )
    times: dict[str, list[float]] = {name: [] for name in models}
    losses: dict[str, list[float]] = {name: [] for name in models}
    batches = augmented_batches(seed, BATCH_SIZE)
    for step in range(1, steps + 1):
        pictures, labels = next(batches)
        for name, model in models.items():
            started = time.perf_counter()
            loss = F.cross_entropy(model(pictures), labels)
            optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            schedules[name].step()
            times[name].append(time.perf_counter() - started)
            losses[name].append(float(loss.detach()))
        if step % 50 == 0:
            shown = ", ".join(
                f"{name} {median(values[-50:]):.3f}" for name, values in losses.items()
            )
            print(f"step {step}/{steps}: training loss {shown}", flush=True)
    found = {}
    for name, model in models.items():
        ratios = [own / dense for own, dense in zip(times[name], times["dense"], strict=True)]
        found[name] = {
            "params": count_params(model),
            "macs": count_macs(model, [Workload("image", images()["training"][0][:1])]),
            **evaluate(model),
            "step_ms": 1e3 * median(times[name]),
            "step_ratio": median(ratios),
        }
    return found


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Mean loss and accuracy on the test images."""
    pictures, labels = images()["evaluation"]
    model.eval()
    logits = torch.cat([model(part) for part in pictures.split(500)])
    right = (logits.argmax(-1) == labels).float().mean()
    return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(right)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4, help="blocks per side; 1 is low rank")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the parameters")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    models = contenders(options.seed, options.blocks, options.keep)
    found = train(models, options.steps, options.seed)
    print("\nmodel     parameters  MACs/image    loss  accuracy  ms/step  step time ratio")
    for name, row in found.items():
        print(
            f"{name:<8}{row['params']:>12,}{row['macs']:>12,.0f}{row['loss']:>8.4f}"
            f"{row['accuracy']:>10.4f}{row['step_ms']:>9.1f}{row['step_ratio']:>17.2f}"
        )


if __name__ == "__main__":
    main()
