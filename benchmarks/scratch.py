"""Structured training from scratch: dense, BLAST, low rank; learning rates; initialisation.

    python benchmarks/scratch.py                          # all that is not in results/scratch yet
    python benchmarks/scratch.py --task vit --minutes 2   # a part of it; call again to go on

Part "runs": the two examples, all contenders side by side.  Part "sweep": narrower models, fewer
steps, each learning rate and initialisation alone.  Writes <part>.csv, figure.png and README.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import blast_search as bs  # noqa: E402
from blast_search.latency import environment  # noqa: E402
from blast_search.tasks.vit import Recipe, VisionTransformer, augmented_batches, images  # noqa: E402
from examples import train_lm, train_vit  # noqa: E402

matplotlib.use("Agg")

TASKS = ("vit", "lm")
SEEDS = (0, 1, 2)
RATES = (1e-3, 2e-3, 4e-3)
BLOCKS, KEEP = 4, 0.5
RUN_STEPS, SWEEP_STEPS, SWEEP_WIDTH = 200, 150, 128
FIELDS = {
    "runs": (
        "task", "seed", "model", "params", "macs", "loss", "accuracy", "perplexity", "step_ms",
        "step_ratio", "environment",
    ),
    "sweep": ("task", "seed", "variant", "learning_rate", "loss", "environment"),
}  # fmt: skip
# Variants of the sweep: rates of (U, S, V), and the initialisation.
VARIANTS = ("dense", "one rate", "derived rates", "one rate, normal init")


def example(task: str) -> Any:
    return {"vit": train_vit, "lm": train_lm}[task]


def sample(task: str) -> torch.Tensor:
    if task == "vit":
        return images()["training"][0][:1]
    return torch.zeros(1, train_lm.CONTEXT, dtype=torch.long)


def runs(task: str, seed: int) -> list[dict[str, Any]]:
    """Dense, uniform BLAST and low rank of equal parameters, on equal batches."""
    module = example(task)
    models = module.contenders(seed, BLOCKS, KEEP)
    models["low rank"] = module.contenders(seed, 1, KEEP)["blast"]
    found = module.train(models, RUN_STEPS, seed)
    return [{"model": name} | row for name, row in found.items()]


def derived(layer: bs.BlastLinear) -> dict[str, float]:
    """Rates relative to the dense model's, as parameter_groups derives them."""
    n, r = layer.in_features, layer.rank
    outer = (3 * n / r) ** 0.25 / 3**0.5
    return {"U": outer, "S": n**0.5, "V": outer}


def groups(model: nn.Module, variant: str, lr: float) -> list[dict[str, Any]]:
    found = bs.parameter_groups(model, lr, 0.01)
    if variant != "derived rates":
        return found
    layers = [m for m in model.modules() if isinstance(m, bs.BlastLinear)]
    return [g for g in found if g["name"] == "rest"] + [
        {"params": [getattr(layer, name)], "lr": lr * rate, "weight_decay": 0.01 / 3 / rate}
        for layer in layers
        for name, rate in derived(layer).items()
    ]


def narrow(task: str, variant: str, seed: int) -> nn.Module:
    def build() -> nn.Module:
        torch.manual_seed(seed)
        if task == "lm":
            return train_lm.Decoder(SWEEP_WIDTH)
        recipe = Recipe(width=SWEEP_WIDTH, depth=2, hidden=4 * SWEEP_WIDTH)
        return VisionTransformer(recipe)

    if variant == "dense":
        return build()
    model = bs.from_scratch(build(), bs.uniform_plan(build(), sample(task), BLOCKS, KEEP))
    if variant == "one rate, normal init":
        for layer in model.modules():
            if isinstance(layer, bs.BlastLinear):
                size = (3 * layer.in_features * layer.rank) ** -0.25
                nn.init.normal_(layer.U, std=size)
                nn.init.normal_(layer.S)
                nn.init.normal_(layer.V, std=size)
    return model


def sweep(task: str, seed: int, variant: str, learning_rate: float) -> list[dict[str, Any]]:
    """The test loss of one small model after a short training."""
    model = narrow(task, variant, seed)
    chosen = groups(model, variant, learning_rate)
    optimizer = torch.optim.AdamW(chosen)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in chosen], total_steps=SWEEP_STEPS, pct_start=0.1
    )
    batches = augmented_batches(seed, 64) if task == "vit" else train_lm.batches(seed)
    for _ in range(SWEEP_STEPS):
        x, wanted = next(batches)
        loss = F.cross_entropy(model(x).flatten(0, -2), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return [{"loss": example(task).evaluate(model)["loss"]}]


def cells(tasks: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What there is to do: (part, the columns that name it)."""
    for seed in SEEDS:
        for task in tasks:
            yield "runs", {"task": task, "seed": seed}
            for variant in VARIANTS:
                for lr in RATES if "init" not in variant else (2e-3,):
                    yield "sweep", {
                        "task": task, "seed": seed, "variant": variant, "learning_rate": lr,
                    }  # fmt: skip


def read(folder: Path, part: str) -> list[dict[str, str]]:
    path = folder / f"{part}.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def append(folder: Path, part: str, rows: list[dict[str, Any]]) -> None:
    path, fresh = folder / f"{part}.csv", not (folder / f"{part}.csv").exists()
    with path.open("a") as stream:
        writer = csv.DictWriter(stream, FIELDS[part], lineterminator="\n", restval="")
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()})


def surroundings() -> str:
    found = environment(torch.device("cpu")) | {
        "dtype": "float32", "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    return json.dumps(found, sort_keys=True)


def table(rows: list[dict[str, str]], steps: int, environments: set[str]) -> list[str]:
    lines = [
        "# Structured training from scratch", "",
        f"`python -m examples.train_vit` and `examples.train_lm`, {steps} steps: dense, uniform "
        f"BLAST (b = {BLOCKS}, {KEEP} of the parameters of every block layer), low rank of about "
        "equal parameters (ranks are rounded). Means over seeds (all values in "
        "brackets where there are several); step time is the median ratio to dense of forward, "
        "backward and optimizer, contenders "
        "taking turns.", "",
        "| task | model | seeds | parameters | MACs (image; byte) | test loss | "
        "accuracy; perplexity | step time ratio |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for task in TASKS:
        for model in ("dense", "blast", "low rank"):
            own = [r for r in rows if (r["task"], r["model"]) == (task, model)]
            if not own:
                continue
            metric = "accuracy" if task == "vit" else "perplexity"
            cell = {key: shown([float(r[key]) for r in own]) for key in ("loss", metric)}
            ratio = mean(float(r["step_ratio"]) for r in own)
            macs = float(own[0]["macs"]) / 1e6
            lines.append(
                f"| {task} | {model} | {len(own)} | {int(own[0]['params']):,} | "
                f"{macs:.2f} M | {cell['loss']} | {cell[metric]} | {ratio:.2f} |"
            )
    for text in sorted(environments):
        e = json.loads(text)
        lines += ["", f"{e['device']} ({e['capability']}, {e['threads']} threads), {e['dtype']}, "
                  f"torch {e['torch']}, Python {e['python']}, {e['date']}; other work ran beside "
                  "it, so step times are rough."]  # fmt: skip
    return lines


def shown(values: list[float]) -> str:
    text = f"{mean(values):.4f}"
    return text if len(values) == 1 else f"{text} ({', '.join(f'{v:.4f}' for v in values)})"


def sweep_table(rows: list[dict[str, str]]) -> list[str]:
    lines = [
        "", "## Learning rates and initialisation", "",
        f"Test loss of narrower models (width {SWEEP_WIDTH}, 2 blocks) after {SWEEP_STEPS} steps. "
        "\"Derived rates\" are those of `parameter_groups`' docstring; \"normal init\" draws U, S "
        "and V from normal distributions of equal variance instead of orthogonal matrices.", "",
        "| task | variant | " + " | ".join(f"lr {rate:g}" for rate in RATES) + " |",
        "|---|---|" + "---:|" * len(RATES),
    ]  # fmt: skip
    for task in TASKS:
        for variant in VARIANTS:
            groups = [
                [
                    float(r["loss"]) for r in rows
                    if (r["task"], r["variant"]) == (task, variant)
                    and float(r["learning_rate"]) == rate
                ]
                for rate in RATES
            ]  # fmt: skip
            if any(groups):
                cells = " | ".join(shown(values) if values else "-" for values in groups)
                lines.append(f"| {task} | {variant} | {cells} |")
    return lines


def figure(rows: list[dict[str, str]], path: Path) -> None:
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, task in zip(axes, TASKS, strict=True):
        for variant, marker in zip(VARIANTS, "sodx", strict=True):
            own = [r for r in rows if (r["task"], r["variant"]) == (task, variant)]
            rates = sorted({float(r["learning_rate"]) for r in own})
            means = [
                mean(float(r["loss"]) for r in own if float(r["learning_rate"]) == rate)
                for rate in rates
            ]
            axis.plot(rates, means, marker=marker, label=variant)
        axis.set(xscale="log", xlabel="learning rate", ylabel="test loss", title=task)
        axis.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        axis.minorticks_off()
        axis.grid(True, color="#e4e4e4")
    axes[0].legend(frameon=False)
    drawn.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then stop")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "scratch")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for part, key in cells((options.task,) if options.task else TASKS):
        done = read(options.out, part)
        if any(all(row[k] == str(v) for k, v in key.items()) for row in done):
            continue
        if time.monotonic() - started > 60 * options.minutes:
            break
        found = {"runs": runs, "sweep": sweep}[part](**key)
        append(options.out, part, [key | r | {"environment": surroundings()} for r in found])
    rows, swept = read(options.out, "runs"), read(options.out, "sweep")
    environments = {r["environment"] for r in rows + swept}
    lines = table(rows, RUN_STEPS, environments) + sweep_table(swept)
    (options.out / "README.md").write_text("\n".join(lines) + "\n")
    figure(swept, options.out / "figure.png")


if __name__ == "__main__":
    main()
