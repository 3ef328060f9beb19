"""Train a small language model from scratch, dense and with BLAST layers, side by side.

    python -m examples.train_lm
    python -m examples.train_lm --blocks 8 --keep 0.3 --steps 1000

A decoder over the bytes of the Wikipedia articles that ship with blast-search; perplexity is per
byte.  All contenders see the same batches and take turns at every step, so their times compare.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blast_search as bs
from blast_search.evaluate import count_macs, count_params
from blast_search.layers import Workload
from blast_search.tasks._text import split_documents, wikipedia

WIDTH, DEPTH, HEADS, CONTEXT = 256, 2, 4, 128
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, WARMUP = 8, 2e-3, 0.01, 0.1


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        y = F.scaled_dot_product_attention(*heads.unbind(2), is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes (B, T) -> logits (B, T, 256) of the next byte."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def text(part: str) -> Tensor:
    """All bytes of a part of the articles ("training" or "evaluation")."""
    joined = "\n".join(getattr(split_documents(wikipedia()), part)).encode()
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (bytes, next bytes), (BATCH_SIZE, CONTEXT) each, from random places."""
    data, generator = text("training"), torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(len(data) - CONTEXT, (BATCH_SIZE, 1), generator=generator)
        rows = data[start + torch.arange(CONTEXT + 1)]
        yield rows[:, :-1], rows[:, 1:]


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Decoder()


def contenders(seed: int, blocks: int, keep: float) -> dict[str, nn.Module]:
    """The dense model, and the same with BLAST layers that were never dense weights."""
    batch = torch.zeros(1, CONTEXT, dtype=torch.long)
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
    for step, (tokens, wanted) in zip(range(1, steps + 1), batches(seed), strict=False):
        shown = []
        for name, model in models.items():
            started = time.perf_counter()
            loss = F.cross_entropy(model(tokens).flatten(0, 1), wanted.flatten())
            optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            schedules[name].step()
            times[name].append(time.perf_counter() - started)
            shown.append(f"{name} {loss.item():.3f}")
        if step % 50 == 0:
            print(f"step {step}/{steps}: training loss {', '.join(shown)}", flush=True)
    found = {}
    for name, model in models.items():
        ratios = [own / dense for own, dense in zip(times[name], times["dense"], strict=True)]
        context = torch.zeros(1, CONTEXT, dtype=torch.long)
        found[name] = {
            "params": count_params(model),
            "macs": count_macs(model, [Workload("context", context)]) / CONTEXT,
            **evaluate(model),
            "step_ms": 1e3 * median(times[name]),
            "step_ratio": median(ratios),
        }
    return found


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Mean loss in nats per byte, and perplexity, on 512 x 128 bytes of other articles."""
    rows = text("evaluation")[: 512 * (CONTEXT + 1)].view(512, CONTEXT + 1)
    model.eval()
    losses = [
        F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        for part in rows.split(64)
    ]
    loss = float(torch.stack(losses).mean())
    return {"loss": loss, "perplexity": math.exp(loss)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4, help="blocks per side; 1 is low rank")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the parameters")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    models = contenders(options.seed, options.blocks, options.keep)
    found = train(models, options.steps, options.seed)
    print("\nmodel     parameters   MACs/byte    loss  perplexity  ms/step  step time ratio")
    for name, row in found.items():
        print(
            f"{name:<8}{row['params']:>12,}{row['macs']:>12,.0f}{row['loss']:>8.4f}"
            f"{row['perplexity']:>12.3f}{row['step_ms']:>9.1f}{row['step_ratio']:>17.2f}"
        )


if __name__ == "__main__":
    main()
