"""results/gpu/<device>/*.json -> README.md, table.md and figure.png in the same folder.

    python benchmarks/gpu_summary.py results/gpu/nvidia-h200

Reads layer.json (gpu.py), model-*.json and factorize-*.json (gpu_model.py); what is missing is
left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {1: "#56B4E9", 4: "#0072B2", 16: "#E69F00"}
PLANS = {
    "uniform b = 16": "#E69F00",
    "uniform b = 4": "#0072B2",
    "uniform low rank": "#009E73",
    "searched": "#D55E00",
}
WORKLOADS = {
    "decode 1": "decoding, 1 sequence",
    "decode 16": "decoding, 16 sequences",
    "prefill": "prompt of 2,048 tokens",
}
# Speed-ups per layer that were aimed at: (tokens at least, at most, b, share) -> times dense.
AIMS = {
    (1, 1, 4, 0.5): 1.6, (1, 1, 4, 0.3): 2.4, (1, 1, 16, 0.5): 1.6, (1, 1, 16, 0.3): 2.4,
    (64, 64, 4, 0.5): 1.4, (64, 64, 4, 0.3): 2.1, (64, 64, 16, 0.5): 1.4, (64, 64, 16, 0.3): 2.1,
    (2048, 8192, 4, 0.5): 1.4, (2048, 8192, 4, 0.3): 2.2,
    (2048, 8192, 16, 0.5): 1.25, (2048, 8192, 16, 0.3): 2.0,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    layer = _read(folder / "layer.json")
    models = [_read(path) for path in sorted(folder.glob("model-*.json"))]
    fits = [_read(path) for path in sorted(folder.glob("factorize-*.json"))]
    device = next(d for d in (layer, *(m["environment"] for m in models + fits)) if d)["device"]
    lines = [f"# {device}", "", "![Speed-ups over dense](figure.png)", ""]
    for model in models:
        lines += _model(model)
        if model["shapes"] == "llama-7b":
            (folder / "table.md").write_text("\n".join(_short(model)))
    if layer:
        lines += _layers(layer)
    for fit in fits:
        lines += _factorization(fit)
    text = "\n".join(lines)
    (folder / "README.md").write_text(text)
    _figure(layer, models, folder / "figure.png")
    print(text)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def _where(e: dict[str, Any], date: str) -> str:
    return (
        f"{e['device']}, driver {e['driver']}, CUDA {e['cuda']}, torch {e['torch']}, "
        f"{e['dtype']}, {date[:10]}."
    )


def _model(found: dict[str, Any]) -> list[str]:
    lines = [f"## {found['shapes']}, whole model, CUDA graphs", ""]
    rows = []
    for workload, part in found["workloads"].items():
        for name, plan in part["plans"].items():
            low, high = plan["speedup_ci95"]
            rows.append((
                workload, name, _share(plan), f"{plan['dense_ms']:.2f}", f"{plan['ms']:.2f}",
                f"{plan['speedup']:.2f} ({low:.2f} to {high:.2f})",
                f"{plan['measured_ratio_layers']:.2f}", f"{plan['score']:.2f}",
                ", ".join(f"{n} {key}" for key, n in plan["layers_by_blocks"].items()),
            ))  # fmt: skip
    heads = (
        "workload",
        "plan",
        "parameters",
        "dense ms",
        "ms",
        "times dense",
        "layers",
        "score",
        "choices",
    )
    lines += _table(heads, rows)
    keys = ("median", "worst", "uncorrected_median", "uncorrected_worst")
    rows = [
        (workload, *(f"{part['latency_check'][key]:.1%}" for key in keys))
        for workload, part in found["workloads"].items()
    ]
    lines += [
        "Predicted against measured latency of the model, 20 random plans outside the fit:",
        "",
    ]
    lines += _table(("workload", "median", "worst", "median, cells alone", "worst"), rows)
    peak = found.get("peak_memory_gib") or 0.0
    lines += [
        f"Decoding: one token after {found['context']}. Peak memory {peak:.0f} GiB; "
        f"{found['seconds_in_all']:.0f} s in all. " + _where(found["environment"], found["date"]),
        "",
    ]
    return lines


def _share(plan: dict[str, Any]) -> str:
    """Of the searched layers' parameters; older files do not have it."""
    return f"{plan['parameter_ratio']:.2f}" if "parameter_ratio" in plan else "-"


def _short(found: dict[str, Any]) -> list[str]:
    """Uniform b = 16 beside the searched plan of its score, as the project's README shows them."""
    names = ("uniform b = 16", "searched")
    rows = [
        (WORKLOADS[workload], *(f"{part['plans'][name]['speedup']:.2f}" for name in names))
        for workload, part in found["workloads"].items()
    ]
    return _table(("times as fast as dense", "uniform b = 16", "searched plan"), rows)


def _layers(found: dict[str, Any]) -> list[str]:
    rows = found["layers"]
    limits = found["ceilings"]
    lines = ["## Single layers, CUDA graphs, weights not in the cache", ""]
    lines += [
        f"Ceilings measured in the same run: {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"{limits['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s. In brackets: share of the roofline.",
        "",
    ]
    aims = []
    for (first, last, b, share), aim in AIMS.items():
        gains = [
            row["speedup"] for row in rows
            if first <= row["tokens"] <= last and (row["b"], row["ratio"]) == (b, share)
        ]  # fmt: skip
        if gains:
            tokens = str(first) if first == last else f"{first} to {last}"
            met = sum(gain >= aim for gain in gains)
            spread = f"{min(gains):.2f} to {max(gains):.2f}"
            aims.append((tokens, b, share, aim, spread, f"{met} of {len(gains)}"))
    lines += _table(("tokens", "b", "share", "aim, times dense", "measured", "met"), aims)
    heads = ("layer", "tokens", "b", "share", "dense us", "low rank us", "BLAST us")
    times = []
    for row in rows:
        us = [
            f"{row[name]['median']:.1f} ({row[name]['of_roofline']:.0%})"
            for name in ("dense", "lowrank", "blast")
        ]
        times.append((
            f"{row['m']} x {row['n']}", row["tokens"], row["b"], row["ratio"], *us,
            f"{row['lowrank_speedup']:.2f}", f"{row['speedup']:.2f}",
        ))  # fmt: skip
    lines += ["<details><summary>All cases</summary>", ""]
    lines += [
        *_table((*heads, "low rank, times dense", "BLAST, times dense"), times),
        "</details>",
    ]
    worst = max(error for row in found["parity"] for error in row["errors"].values())
    lines += [
        "",
        f"Parity with float64: {len(found['parity'])} cases, forward and gradients, worst "
        f"relative error {worst:.1e}. " + _where(found, found["date"]),
        "",
    ]
    return lines


def _factorization(found: dict[str, Any]) -> list[str]:
    lines = [f"## Factorising {found['shapes']}, b = 16, half the parameters", ""]
    lines += [
        f"{found['matrices']} of {found['of']} matrices in {found['seconds']:.0f} s: "
        f"{found['seconds_for_all'] / 60:.1f} minutes for all at that rate.",
        "",
    ]
    rows = [
        (row["layer"], row["rank"], f"{row['als']:.4f}", f"{row['precgd_300']:.4f}",
         f"{row['precgd_seconds']:.0f}")
        for row in found["precgd"]
    ]  # fmt: skip
    heads = ("layer", "rank", "error", "error of PrecGD-300", "its seconds")
    return [*lines, *_table(heads, rows), _where(found["environment"], found["date"]), ""]


def _figure(layer: dict[str, Any], models: Sequence[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), dpi=150, layout="constrained")
    rows = [row for row in layer.get("layers", []) if row["ratio"] == 0.5]
    tokens = sorted({row["tokens"] for row in rows})
    for b in sorted({row["b"] for row in rows}):
        gains = [
            geometric_mean(r["speedup"] for r in rows if (r["tokens"], r["b"]) == (t, b))
            for t in tokens
        ]
        label = f"b = {b}" if b > 1 else "b = 1 (low rank)"
        left.plot(range(len(tokens)), gains, "o-", color=COLOURS[b], label=label)
    left.axhline(1, color="#000000", linewidth=1)
    left.axhline(2, color="#888888", linestyle="--", linewidth=1, label="roofline")
    left.set_xticks(range(len(tokens)), [f"{t:,}" for t in tokens])
    left.set(xlabel="tokens", ylabel="times as fast as dense", ylim=(0, 2.2))
    left.set_title("Single layers of Llama-7B, half the parameters", fontsize=11)
    left.legend(frameon=False, loc="lower right")
    parts = models[0]["workloads"] if models else {}
    for k, (name, colour) in enumerate(PLANS.items()):
        places = [i + (k - 1.5) * 0.2 for i in range(len(parts))]
        gains = [part["plans"][name]["speedup"] for part in parts.values()]
        bars = right.bar(places, gains, 0.18, color=colour, label=name)
        right.bar_label(bars, fmt="%.2f", fontsize=8)
    right.axhline(1, color="#000000", linewidth=1)
    right.set_xticks(range(len(parts)), list(parts))
    right.set(ylabel="times as fast as dense", ylim=(0, 2.2))
    right.set_title("Whole model; searched: the score of uniform b = 16", fontsize=11)
    right.legend(frameon=False, ncols=2, loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
