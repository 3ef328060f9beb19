"""Time single layers: BLAST beside dense, beside low rank of equal MACs, beside broadcasting.

    python benchmarks/layer.py                       # float32 and bfloat16, inference and training
    python benchmarks/layer.py --dtype float32 --threads 1

All contenders of a case run in one process, interleaved, medians of the ratios of each round.
Writes results/layer/<dtype>-<threads>t.csv and .png; prints what holds of the aims and what not.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from blast_search import BlastLinear
from blast_search.latency import environment, interleave

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)]
LARGE = [(4096, 4096)]
TOKENS = (1, 8, 32, 128, 512)
BLOCKS = (1, 2, 4, 8, 16)
KEEPS = (0.5, 0.3)
SECONDS = 0.12


class Broadcasting(nn.Module):
    """The published reference's way: all b x b products as one (b, b, T, r) tensor."""

    def __init__(self, layer: BlastLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        u, s, v = self.layer.U, self.layer.S, self.layer.V
        z = x.view(len(x), len(v), -1).transpose(0, 1) @ v
        w = (z.unsqueeze(0) * s.unsqueeze(2)).sum(1)
        y = (w @ u.transpose(1, 2)).transpose(0, 1).reshape(len(x), -1)
        return y + self.layer.bias


def rank_of(m: int, n: int, b: int, keep: float) -> int:
    """As in the default search space: a multiple of 8."""
    return max(8, round(keep * m * n / (m + n + b * b) / 8) * 8)


def contenders(m: int, n: int, b: int, keep: float, dtype: torch.dtype) -> dict[str, nn.Module]:
    rank = rank_of(m, n, b, keep)
    blast = BlastLinear(n, m, b, rank, dtype=dtype)
    equal = round(rank * (m + n + b * b) / (m + n))
    low_rank = nn.Sequential(nn.Linear(n, equal, bias=False), nn.Linear(equal, m)).to(dtype)
    return {"dense": nn.Linear(n, m).to(dtype), "low_rank": low_rank, "blast": blast}


def ratios(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, np.ndarray]:
    """Per contender, the rounds' times relative to BLAST's: its speed-up over that contender."""
    times = interleave(calls, lambda: None, seconds)
    return {name: values / times["blast"] for name, values in times.items()} | {
        "median_us": times["blast"], "dense_us": times["dense"],
    }  # fmt: skip


def row(
    kind: str, m: int, n: int, b: int, keep: float, tokens: int, found: dict[str, np.ndarray]
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "kind": kind, "out_features": m, "in_features": n, "num_blocks": b,
        "rank": rank_of(m, n, b, keep), "keep": keep, "tokens": tokens,
        "rounds": len(found["blast"]),
        "blast_us": f"{np.median(found['median_us']):.2f}",
        "dense_us": f"{np.median(found['dense_us']):.2f}",
    }  # fmt: skip
    for name in ("dense", "low_rank", "broadcasting"):
        if name in found:
            p10, p50, p90 = np.percentile(found[name], (10, 50, 90))
            values |= {f"over_{name}": f"{p50:.3f}", f"over_{name}_p10": f"{p10:.3f}",
                       f"over_{name}_p90": f"{p90:.3f}"}  # fmt: skip
    return values


def inference(
    dtype: torch.dtype, shapes: list[tuple[int, int]], counts: list[int], broadcasting: bool
) -> Iterator[dict[str, Any]]:
    with torch.inference_mode():
        for m, n in shapes:
            for keep in KEEPS:
                for b in BLOCKS:
                    modules = contenders(m, n, b, keep, dtype)
                    if b > 1 and broadcasting:
                        modules["broadcasting"] = Broadcasting(modules["blast"])  # type: ignore[arg-type]
                    for tokens in counts:
                        x = torch.randn(tokens, n, dtype=dtype)
                        calls = {k: (lambda f=f, x=x: f(x)) for k, f in modules.items()}
                        found = ratios(calls, SECONDS * (4 if m * n > 4e6 else 1))
                        yield row("inference", m, n, b, keep, tokens, found)


def training(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for m, n in [shape for shape in SHAPES if min(shape) >= 768]:
        for b in (1, 2, 4, 8, 16):
            modules = contenders(m, n, b, 0.5, dtype)
            for tokens in (128, 512):
                x = torch.randn(tokens, n, dtype=dtype, requires_grad=True)
                grad = torch.randn(tokens, m, dtype=dtype)
                calls = {
                    k: (lambda f=f, x=x, g=grad: f(x).backward(g)) for k, f in modules.items()
                }
                yield row("training", m, n, b, 0.5, tokens, ratios(calls, 2 * SECONDS))


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Geometric means over shapes and fractions, per block count and token count."""
    lines = []
    for kind, name, title in (
        ("inference", "low_rank", "speed relative to low rank of equal MACs"),
        ("inference", "dense", "speed-up over dense"),
        ("inference", "broadcasting", "speed-up over broadcasting"),
        ("training", "dense", "forward and backward, half the parameters: speed-up over dense"),
    ):
        groups: dict[tuple[int, int], list[float]] = defaultdict(list)
        for r in rows:
            if r["kind"] == kind and f"over_{name}" in r:
                groups[r["num_blocks"], r["tokens"]].append(float(r[f"over_{name}"]))
        if not groups:
            continue
        tokens = sorted({t for _, t in groups})
        lines += ["", f"{title} (geometric mean, worst case in brackets)"]
        lines.append("  b   " + "".join(f"T={t:<13}" for t in tokens))
        for b in sorted({b for b, _ in groups}):
            cells = [groups.get((b, t), []) for t in tokens]
            shown = [f"{geometric_mean(c):.2f} ({min(c):.2f})" if c else "-" for c in cells]
            lines.append(f"  {b:<4}" + "".join(f"{cell:<15}" for cell in shown))
        everything = [value for values in groups.values() for value in values]
        lines.append(f"  all {geometric_mean(everything):.2f} (worst {min(everything):.2f})")
    return lines


def figure(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    counts = sorted({r["tokens"] for r in rows if r["kind"] == "inference"})
    shown, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True, layout="constrained")
    for axis, name, label in (
        (axes[0], "low_rank", "speed relative to low rank of equal MACs"),
        (axes[1], "dense", "speed-up over dense"),
    ):
        for b in BLOCKS:
            points = []
            for t in counts:
                values = [
                    float(r[f"over_{name}"])
                    for r in rows
                    if r["kind"] == "inference" and (r["num_blocks"], r["tokens"]) == (b, t)
                ]
                points.append(geometric_mean(values))
            axis.plot(counts, points, marker="o", label=f"b = {b}")
        axis.axhline(1, color="#888888", linewidth=1)
        axis.set(xscale="log", xlabel="tokens", ylabel=label, ylim=(0, None))
        axis.set_xticks(counts, [str(t) for t in counts])
        axis.grid(True, color="#e4e4e4")
    axes[0].legend(frameon=False)
    shown.suptitle(title, fontsize=10)
    shown.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--no-broadcasting", action="store_true")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--large", action="store_true", help="also 4096 x 4096")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "layer")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in [arguments.dtype] if arguments.dtype else ["float32", "bfloat16"]:
        dtype = getattr(torch, name)
        shapes = SHAPES + (LARGE if arguments.large else [])
        rows = list(inference(dtype, shapes, arguments.tokens, not arguments.no_broadcasting))
        if dtype == torch.float32 and not arguments.no_training:
            rows += training(dtype)
        env = environment(torch.device("cpu")) | {
            "dtype": name, "date": datetime.now(UTC).date().isoformat(), "script": "layer.py",
        }  # fmt: skip
        stem = arguments.out / f"{name}-{arguments.threads}t"
        fields = list(dict.fromkeys(key for r in rows for key in r))
        with stem.with_suffix(".csv").open("w") as stream:
            stream.write(f"# {json.dumps(env)}\n")
            writer = csv.DictWriter(stream, fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        title = f"{env['device']}, {arguments.threads} threads, {name}, torch {env['torch']}, "
        figure(rows, title + str(env["date"]), stem.with_suffix(".png"))
        text = "\n".join([title + str(env["date"]), *summary(rows)]) + "\n"
        stem.with_suffix(".txt").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
