"""results/factorize/*.csv -> figure.png and README.md: which claims held, and by how much."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from factorize import FOLDER, KINDS, LONG, read

Rows = list[dict[str, Any]]
TIME_SHARE = 1 / 8
BLIND_SHARE = 0.65


def main() -> None:
    lines = ["# Factorisation on real weights", ""]
    lines += ["| claim | held | worst case |", "|---|---|---|"]
    details: list[str] = []
    if rows := read("speed"):
        runs = _runs(rows)
        lines += _speed_claims(runs)
        details += _speed_table(runs)
        _figure(runs)
    if rows := read("quality"):
        lines += _quality_claims(rows)
        details += _quality_table(rows)
    if rows := read("large"):
        last = rows[-1]
        lines += [
            _claim(
                "4096 x 4096, b = 16, r = 992 within 300 s",
                last["seconds"] <= 300 and last["error"] <= last["svd"],
                f"{last['seconds']:.0f} s; error {last['error']:.4f}, SVD {last['svd']:.4f}",
            )
        ]
    for part in ("speed", "quality", "large"):
        path = FOLDER / f"{part}.json"
        if path.exists():
            e = json.loads(path.read_text())
            details += [
                f"{part}: {e['device']} ({e['capability']}, {e['threads']} threads), "
                f"{e['dtype']}, torch {e['torch']}, Python {e['python']}, {e['date']}.",
                "",
            ]
    text = "\n".join([*lines, "", *details])
    (FOLDER / "README.md").write_text(text)
    print(text)


def _claim(text: str, held: bool, worst: str) -> str:
    return f"| {text} | {'yes' if held else '**no**'} | {worst} |"


def _runs(rows: Rows) -> dict[tuple[Any, ...], dict[tuple[str, int], Rows]]:
    """(layer, b, keep, rank) -> (method, sweeps) -> trace."""
    runs: dict[tuple[Any, ...], dict[tuple[str, int], Rows]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        case = (row["layer"], int(row["b"]), row["keep"], int(row["rank"]))
        runs[case][row["method"], int(row["sweeps"])].append(row)
    return runs


def _reach(runs: dict[tuple[str, int], Rows]) -> tuple[float, float]:
    """(seconds until als is at PrecGD-300's error, PrecGD's seconds)."""
    target = runs["precgd", 300][-1]
    times = [
        row["seconds"]
        for key in (("als", 30), ("als", LONG))
        for row in runs[key]
        if row["error"] <= target["error"]
    ]
    return min(times, default=float("inf")), target["seconds"]


def _speed_claims(runs: Any) -> list[str]:
    shares = {case: (lambda t: t[0] / t[1])(_reach(r)) for case, r in runs.items()}
    worst = max(shares, key=lambda case: shares[case])
    rises = above = 0.0
    for r in runs.values():
        for (method, _), trace in r.items():
            if method == "als":
                errors = [row["error"] for row in trace[:-1]]
                rises = max([rises, *(b - a for a, b in pairwise(errors))])
                above = max(above, trace[-1]["error"] / trace[-1]["svd"])
    return [
        _claim(
            "PrecGD-300's error in at most 1/8 of its time",
            shares[worst] <= TIME_SHARE,
            f"1/{1 / shares[worst]:.0f} on {worst[0]}, b = {worst[1]}, keep {worst[2]:g}",
        ),
        _claim(
            "never above the SVD of the same rank", above <= 1, f"{above:.3f} of the SVD's error"
        ),
        _claim("monotone", rises <= 0, f"largest rise {rises:.1e}"),
    ]


def _speed_table(runs: Any) -> list[str]:
    lines = [
        "Relative error (seconds) after 30 ALS sweeps, 300 of PrecGD, 300 of Adam from the SVD:",
        "",
        "| layer | b | keep | rank | SVD | ALS-30 | PrecGD-300 | Adam-300 | ALS reaches PrecGD's "
        "error in |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (layer, b, keep, rank), r in runs.items():
        cells = [
            f"{r[key][-1]['error']:.4f} ({r[key][-1]['seconds']:.2f})"
            for key in (("als", 30), ("precgd", 300), ("adam", 300))
        ]
        reached, whole = _reach(r)
        svd = r["als", 30][-1]["svd"]
        lines.append(
            f"| {layer} | {b} | {keep:g} | {rank} | {svd:.4f} | {' | '.join(cells)} | "
            f"{reached:.2f} s, 1/{whole / reached:.0f} |"
        )
    return [*lines, ""]


def _quality_claims(rows: Rows) -> list[str]:
    claims = []
    for other, limit, text in (
        ("unweighted", BLIND_SHARE, "full G at most 0.65 of the unweighted error"),
        ("whitened_svd", 1.0, "full G below whitened SVD at equal parameters"),
        ("monarch", 1.0, "full G below activation-aware Monarch (beside)"),
    ):
        worst = max(rows, key=lambda row: row["full"] / row[other])
        middle = median(row["full"] / row[other] for row in rows)
        lost = sum(row["full"] > limit * row[other] for row in rows)
        claims.append(
            _claim(
                f"{text}, all {len(rows)} cases",
                lost == 0,
                f"{worst['full'] / worst[other]:.3f} on {worst['layer']}, b = {worst['b']:g}, "
                f"keep {worst['keep']:g}; median {middle:.3f}; "
                f"{lost} cases lost",
            )
        )
    return claims


def _quality_table(rows: Rows) -> list[str]:
    groups: dict[tuple[int, float], Rows] = defaultdict(list)
    for row in rows:
        groups[int(row["b"]), row["keep"]].append(row)
    heads = [kind.replace("_", " ") for kind in KINDS]
    lines = [
        "Mean weighted error over the layers of minilm, at equal parameters except for "
        "block-diagonal (1/b of the dense parameters at any keep); last two columns: worst ratio "
        "on a layer.",
        "",
        f"| b | keep | {' | '.join(heads)} | full / unweighted | full / whitened svd |",
        "|---:|---:|" + "---:|" * (len(heads) + 2),
    ]
    for (b, keep), group in groups.items():
        means = [f"{sum(row[kind] for row in group) / len(group):.4f}" for kind in KINDS]
        worst = [
            f"{max(row['full'] / row[other] for row in group):.3f}"
            for other in ("unweighted", "whitened_svd")
        ]
        lines.append(f"| {b} | {keep:g} | {' | '.join(means + worst)} |")
    return [*lines, ""]


def _figure(runs: Any) -> None:
    layers = sorted({case[0] for case in runs})
    columns = sorted({case[1:3] for case in runs})
    figure, axes = plt.subplots(
        len(layers), len(columns), figsize=(4 * len(columns), 3 * len(layers)), squeeze=False
    )
    for (layer, b, keep, rank), r in runs.items():
        axis = axes[layers.index(layer)][columns.index((b, keep))]
        for key, label in (
            (("als", LONG), "ALS"),
            (("precgd", 300), "PrecGD"),
            (("adam", 300), "Adam"),
        ):
            trace = r[key]
            axis.plot(
                [row["seconds"] for row in trace], [row["error"] for row in trace], label=label
            )
        svd = r["als", 30][-1]["svd"]
        axis.axhline(svd, color="grey", linestyle=":", label="SVD")
        axis.set(xscale="log", ylim=(None, svd * 1.3), title=f"{layer}\nb = {b}, r = {rank}")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.supxlabel("seconds")
    figure.supylabel("relative error")
    figure.tight_layout()
    figure.savefig(FOLDER / "figure.png", dpi=110)


if __name__ == "__main__":
    main()
