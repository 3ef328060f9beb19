"""Measure the factorisation on real weights; keep the results under results/factorize/.

    python benchmarks/factorize.py speed    # ALS, PrecGD-300, Adam: error against time
    python benchmarks/factorize.py quality  # weighted errors of all minilm layers
    python benchmarks/factorize.py large    # one 4096 x 4096 weight
    python benchmarks/factorize.py summary  # figure, and which claims held

speed and quality take --blocks and --keep to do a part; parts add up in the CSV files.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blast_search import factorize, find_layers
from blast_search.calibrate import collect_grams
from blast_search.factors import relative_error
from blast_search.latency import environment
from blast_search.layers import dense_weight, get_modules
from blast_search.lowrank import low_rank_basis
from blast_search.structures import block_diagonal, monarch
from blast_search.tasks.minilm import MiniLMTask

FOLDER = Path(__file__).resolve().parent.parent / "results" / "factorize"
SPEED_LAYERS = ("attention.self.query", "intermediate.dense", "output.dense")
LONG = 100  # sweeps of the long ALS run, for times to reach an error
KINDS = ("svd", "unweighted", "whitened_svd", "block", "full", "block_diagonal", "monarch")


def rank_at(keep: float, m: int, n: int, b: int) -> int:
    """The largest BLAST rank within a share of the dense parameters; b = 0: of U V^T alone."""
    return int(keep * m * n / (m + n + b * b))


def minilm() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    task = MiniLMTask()
    model = task.model()
    layers = find_layers(model)
    grams = collect_grams(model, layers, task.calibration())
    return {k: dense_weight(v) for k, v in get_modules(model, layers).items()}, grams


def append(name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a CSV file; the environment of the latest run goes beside it."""
    rows = list(rows)
    path = FOLDER / f"{name}.csv"
    FOLDER.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
    info = environment(torch.device("cpu"))
    info |= {"dtype": "float32", "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    (FOLDER / f"{name}.json").write_text(json.dumps(info, indent=1) + "\n")


def read(name: str) -> list[dict[str, Any]]:
    path = FOLDER / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def timed(run: Callable[[Callable[[float], None]], Any]) -> tuple[list[tuple[float, float]], Any]:
    """(seconds, error) after every sweep, start included in the time; and what run returns."""
    trace: list[tuple[float, float]] = []
    start = time.perf_counter()
    result = run(lambda error: trace.append((time.perf_counter() - start, error)))
    trace.append((time.perf_counter() - start, result.error))
    return trace, result


def speed(blocks: list[int], keeps: list[float]) -> None:
    weights, _ = minilm()
    for short in SPEED_LAYERS:
        name = next(k for k in weights if k.endswith(f"layer.2.{short}"))
        a = weights[name]
        factorize(a, 4, 8, sweeps=3)  # warm up
        for b in blocks:
            for keep in keeps:
                r = rank_at(keep, *a.shape, b)
                runs = (("als", 30), ("als", LONG), ("precgd", 300), ("adam", 300))
                for method, sweeps in runs:
                    trace, _ = timed(
                        lambda report, a=a, b=b, r=r, method=method, sweeps=sweeps: factorize(
                            a, b, r, sweeps=sweeps, method=method, on_sweep=report
                        )
                    )
                    fixed = {"layer": short, "m": len(a), "n": len(a.T), "b": b, "keep": keep}
                    fixed |= {"rank": r, "svd": f"{low_rank_basis(a).error(r):.6g}"}
                    fixed |= {"method": method, "sweeps": sweeps}
                    append(
                        "speed",
                        [fixed | {"seconds": f"{t:.4g}", "error": f"{e:.6g}"} for t, e in trace],
                    )
                    print(short, b, keep, method, sweeps, *trace[-1], flush=True)


def quality(blocks: list[int], keeps: list[float]) -> None:
    weights, grams = minilm()
    for b in blocks:
        for keep in keeps:
            rows = [quality_row(k, a, grams[k], b, keep) for k, a in weights.items()]
            append("quality", rows)
            print(b, keep, {k: sum(float(row[k]) for row in rows) / len(rows) for k in KINDS})


def quality_row(name: str, a: Tensor, gram: Tensor, b: int, keep: float) -> dict[str, Any]:
    """Errors in the Gram's norm of one layer, at equal parameters."""
    m, n = a.shape
    r, plain = rank_at(keep, m, n, b), rank_at(keep, m, n, 0)
    basis = low_rank_basis(a, gram, name=name)
    blind = low_rank_basis(a).factors(plain)
    start = time.perf_counter()
    full = factorize(a, b, r, gram, basis=basis)
    seconds = time.perf_counter() - start
    t = max(1, int(keep * m * n / (b * (m + n))))
    own = block_diagonal(a, b, gram)
    errors = {
        "svd": relative_error(a, (blind.U, blind.S, blind.V), gram),
        "unweighted": factorize(a, b, r, gram, whitening="none").error,
        "whitened_svd": factorize(a, 1, plain, gram, basis=basis).error,
        "block": factorize(a, b, r, gram, whitening="block").error,
        "full": full.error,
        "block_diagonal": own.factors.error,
        "monarch": monarch(a, b, t, gram).factors.error,
    }
    row: dict[str, Any] = {"layer": name, "m": m, "n": n, "b": b, "keep": keep, "rank": r}
    row |= {kind: f"{errors[kind]:.6g}" for kind in KINDS}
    # The block-diagonal matrix has one size per b; its share of the dense parameters.
    return row | {
        "block_diagonal_share": own.parameters / (m * n),
        "full_seconds": f"{seconds:.3g}",
    }


def large() -> None:
    """4096 x 4096, b = 16, r = 992 (half the parameters), singular values k^-1/2."""
    n, b, r = 4096, 16, 992
    generator = torch.Generator().manual_seed(0)
    bases = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for _ in range(2))
    values = torch.arange(1, n + 1).float() ** -0.5
    left, right = bases
    a = (left * values) @ right.T
    trace, _ = timed(lambda report: factorize(a, b, r, on_sweep=report))
    svd = float((values[r:].square().sum() / values.square().sum()).sqrt())
    rows = [{"svd": f"{svd:.6g}", "seconds": f"{t:.4g}", "error": f"{e:.6g}"} for t, e in trace]
    append("large", rows)
    print(rows[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("speed", "quality", "large", "summary"))
    parser.add_argument("--blocks", type=int, nargs="+")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3])
    arguments = parser.parse_args()
    if arguments.part == "speed":
        speed(arguments.blocks or [4, 16], arguments.keep)
    elif arguments.part == "quality":
        quality(arguments.blocks or [2, 4, 8], arguments.keep)
    elif arguments.part == "large":
        large()
    else:
        import factorize_summary

        factorize_summary.main()


if __name__ == "__main__":
    main()
