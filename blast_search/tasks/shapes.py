"""Transformers of published sizes, without anybody's weights: for latency work.

`--shapes llama-7b` (or `--task shapes:llama-7b`).  Structure and sizes are those of the papers and
configuration files; the weights are random with a decaying spectrum, so that a search has
something to choose, and its quality figures mean nothing beyond that.

Sizes: Llama 7B (arXiv 2302.13971, table 2), Llama 3 8B (arXiv 2407.21783, table 3), GPT-2 small
(Radford et al. 2019), ViT-L/16 (arXiv 2010.11929, table 1), DiT-XL/2 (arXiv 2212.09748, table 1).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blast_search.batches import Batch, call_model
from blast_search.errors import UsageError
from blast_search.outputs import divergences, reference_outputs

DECAY = 0.6  # of the weights' column norms: column k has k ** -DECAY of the first one's


@dataclass(frozen=True)
class Shape:
    """One architecture.

    Attributes:
        kv_heads: of grouped-query attention; 0: as many as heads.
        gated: SwiGLU with three matrices instead of GELU with two.
        fused: query, key and value in one matrix.
        modulated: adaLN-Zero: each block computes six vectors from a condition (DiT).
        vocab: of a language model with causal attention; 0: tokens are vectors.
        tokens: of a prompt (Llama's and GPT-2's training context, or a part of it) or an image.
        inputs: numbers per token that is a vector.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    kv_heads: int = 0
    gated: bool = False
    fused: bool = False
    bias: bool = True
    modulated: bool = False
    vocab: int = 0
    tokens: int = 2048
    inputs: int = 0
    outputs: int = 0

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads


SHAPES = {
    "llama-7b": Shape(4096, 32, 32, 11008, gated=True, bias=False, vocab=32000),
    "llama-3-8b": Shape(4096, 32, 32, 14336, kv_heads=8, gated=True, bias=False, vocab=128256),
    "gpt2": Shape(768, 12, 12, 3072, fused=True, vocab=50257, tokens=896),
    "vit-l": Shape(1024, 24, 16, 4096, fused=True, tokens=197, inputs=768, outputs=1000),
    "dit-xl": Shape(1152, 28, 16, 4608, fused=True, modulated=True, tokens=256, inputs=16,
                    outputs=32),
}  # fmt: skip


class Block(nn.Module):
    """A pre-norm transformer block on (B, T, width)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        s = self.shape = shape
        kv = s.key_heads * s.head_size
        norm = nn.RMSNorm if s.gated else nn.LayerNorm
        self.norm1, self.norm2 = norm(s.width), norm(s.width)
        if s.fused:
            self.qkv = nn.Linear(s.width, s.width + 2 * kv, s.bias)
        else:
            self.q = nn.Linear(s.width, s.width, s.bias)
            self.k, self.v = (nn.Linear(s.width, kv, s.bias) for _ in range(2))
        self.o = nn.Linear(s.width, s.width, s.bias)
        if s.gated:
            self.gate = nn.Linear(s.width, s.hidden, s.bias)
        self.up = nn.Linear(s.width, s.hidden, s.bias)
        self.down = nn.Linear(s.hidden, s.width, s.bias)
        if s.modulated:
            self.modulation = nn.Linear(s.width, 6 * s.width)

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None,
        cache: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """x (B, T, width); condition (B, width); cache (2, B, heads, positions, head size)."""
        if condition is None:
            x = x + self.attention(self.norm1(x), cache, rotation)
            return x + self.feed_forward(self.norm2(x))
        parts = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, None, None)
        out: Tensor = x + gate2 * self.feed_forward(self.norm2(x) * (1 + scale2) + shift2)
        return out

    def attention(
        self, x: Tensor, cache: Tensor | None, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        s, t = self.shape, x.shape[1]
        kv = s.key_heads * s.head_size
        if s.fused:
            q, k, v = self.qkv(x).split((s.width, kv, kv), -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (part.unflatten(-1, (-1, s.head_size)).transpose(1, 2) for part in (q, k, v))
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        if cache is not None:
            cache[0, :, :, -t:], cache[1, :, :, -t:] = k, v
            k, v = cache[0], cache[1]
        causal = s.vocab > 0 and t > 1
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1]
        )
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out

    def feed_forward(self, x: Tensor) -> Tensor:
        if self.shape.gated:
            out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        else:
            out = self.down(F.gelu(self.up(x)))
        return out


def rotation_of(past: int, t: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (t, size) of rotary position embedding, from position `past` on."""
    kind: dict[str, Any] = {"device": like.device, "dtype": torch.float32}
    frequencies = 10_000.0 ** (-torch.arange(0, size, 2, **kind) / size)
    angles = torch.arange(past, past + t, **kind)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(like.dtype), torch.cat((-sin, sin), -1).to(like.dtype)


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, heads, T, size) turned by its positions."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Transformer(nn.Module):
    """(ids or vectors, condition, cache) -> logits or vectors, (B, T, outputs)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        if shape.vocab:
            self.embed: nn.Module = nn.Embedding(shape.vocab, shape.width)
        else:
            self.embed = nn.Linear(shape.inputs, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.RMSNorm(shape.width) if shape.gated else nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab or shape.outputs, bias=False)

    def forward(
        self, x: Tensor, condition: Tensor | None = None, cache: Tensor | None = None
    ) -> Tensor:
        """x (B, T) or (B, T, inputs); cache (depth, 2, B, kv heads, positions, head size).

        The cache holds what came before; the last T positions are overwritten with x's own.
        """
        h = self.embed(x)
        s, t = self.shape, x.shape[1]
        past = 0 if cache is None else cache.shape[4] - t
        rotation = rotation_of(past, t, s.head_size, h) if s.gated else None
        for index, block in enumerate(self.blocks):
            h = block(h, condition, None if cache is None else cache[index], rotation)
        out: Tensor = self.head(self.norm(h))
        return out


class ShapesTask:
    """An architecture with random weights and random data."""

    metric = ("divergence from dense", False)
    train_steps = 10

    def __init__(self, name: str) -> None:
        if name not in SHAPES:
            raise UsageError(f"unknown shapes {name!r}, expected one of {', '.join(SHAPES)}.")
        self.name, self.shape = f"shapes-{name}", SHAPES[name]
        self._references: dict[Any, list[Any]] = {}  # the dense model's outputs, to evaluate

    def model(self) -> nn.Module:
        """Random weights whose columns decay, in an order and at a rate that differ by layer."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            chance = random.Random(0)  # no torch.rand: on the "meta" device it has no value
            model = Transformer(self.shape)
            for module in model.blocks.modules():
                if isinstance(module, nn.Linear):
                    n = module.in_features
                    rate = DECAY * (0.5 + chance.random())
                    norms = torch.arange(1, n + 1)[torch.randperm(n)] ** -rate
                    with torch.no_grad():
                        module.weight.mul_(norms * norms.square().mean().rsqrt())
        return model

    def workload(self) -> Any:
        """One request: a prompt and 128 further tokens, one by one; or 8 images."""
        if not self.shape.vocab:
            return self.make_workload(8, self.shape.tokens)
        return {
            "prefill": (self.make_workload(1, self.shape.tokens), 1.0),
            "decode": (self.make_workload(1, 1), 128.0),
        }

    def make_workload(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """Zeros; a single token of a text comes after a cached prompt."""
        s = self.shape
        if s.vocab and length > 1:
            return {"x": torch.zeros(batch_size, length, dtype=torch.long)}
        if s.vocab:
            size = (s.depth, 2, batch_size, s.key_heads, s.tokens + 1, s.head_size)
            ids = torch.zeros(batch_size, 1, dtype=torch.long)
            return {"x": ids, "cache": torch.zeros(size)}
        batch = {"x": torch.zeros(batch_size, length, s.inputs)}
        return batch | ({"condition": torch.zeros(batch_size, s.width)} if s.modulated else {})

    def batches(self, seed: int, count: int) -> Iterator[dict[str, Tensor]]:
        """Random batches of one short text or image."""
        s, generator = self.shape, torch.Generator().manual_seed(seed)
        for _ in range(count):
            batch = self.make_workload(1, min(s.tokens, 256))
            for key, value in batch.items():
                if value.is_floating_point():
                    batch[key] = torch.randn(value.shape, generator=generator)
                else:
                    batch[key] = torch.randint(0, s.vocab, value.shape, generator=generator)
            yield batch

    def calibration(self) -> list[Batch]:
        return list(self.batches(0, 4))

    def evaluate(self, model: nn.Module) -> float:
        """Mean divergence from the dense model on random data."""
        parameter, batches = next(model.parameters()), list(self.batches(1, 4))
        place = parameter.device, parameter.dtype
        if place not in self._references:  # once: this model may be large
            dense = self.model().eval().to(*place)
            self._references[place] = reference_outputs(dense, batches)
        return fmean(divergences(model, batches, self._references[place]))

    def train_batches(self, seed: int) -> Iterator[Batch]:
        return self.batches(seed + 2, sys.maxsize)

    def loss(self, model: nn.Module, batch: Batch, teacher: nn.Module) -> Tensor:
        """Squared error relative to the dense model's output."""
        with torch.no_grad():
            wanted = call_model(teacher, batch)
        found: Tensor = call_model(model, batch)
        error: Tensor = (found - wanted).square().mean() / wanted.square().mean()
        return error
