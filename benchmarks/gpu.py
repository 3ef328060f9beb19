"""Measure the GPU kernels: are they right, and how near the hardware's limits are they?

    python benchmarks/gpu.py                              # one NVIDIA GPU, under ten minutes
    python benchmarks/gpu.py --shapes tiny --interpret    # dry check on a CPU, no real timings:
                                                          # only parity runs Triton there

Needs torch, triton and numpy besides this package. Writes layer.json to --out (default
results/gpu/<device>): device, driver, versions, dtype, date, the device's measured ceilings,
errors against float64, and for each layer shape, token count, block count and share of
parameters the time of dense (cuBLAS), low rank with as many multiply-adds, and BLAST.

How a time is taken: CUDA graphs for all contenders; each holds many calls that rotate through
enough copies of the weights to exceed the L2 cache twice; the contenders of one layer shape and
token count are replayed in turn, many rounds; a figure is the median over rounds, with p10 and
p90, in microseconds per call.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import numpy as np
import torch
import triton
from torch import Tensor, nn
from torch.nn import functional as F

from blast_search.files import write_json
from blast_search.kernels import triton as kernel
from blast_search.kernels import triton_tune as tune
from blast_search.matrix import BlastLinear, to_dense
from blast_search.modes import device_timer, flusher

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
GRAPH_SECONDS = 1e-3  # per replay: well above the cost of launching one
RANK_STEP = 16


@dataclass(frozen=True)
class Setup:
    device: torch.device
    shapes: tuple[tuple[int, int], ...]  # m, n
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    ratios: tuple[float, ...]  # share of the dense parameters
    rounds: int
    dtype: torch.dtype = torch.bfloat16

    def rank(self, m: int, n: int, b: int, ratio: float) -> int:
        rank = int(ratio * m * n / (m + n + b * b))
        return max(1, rank - rank % RANK_STEP if rank > RANK_STEP else rank)


def setup(shapes: str, device: torch.device) -> Setup:
    if shapes == "tiny":
        return Setup(device, ((64, 64), (96, 64)), (1, 7, 70), (1, 4), (0.5,), 2)
    layers = ((4096, 4096), (11008, 4096), (4096, 11008))
    return Setup(device, layers, (1, 16, 64, 2048, 8192), (1, 4, 16), (0.5, 0.3), 20)


def factors(m: int, n: int, b: int, r: int, like: dict[str, Any]) -> tuple[Tensor, ...]:
    """u, s, v of a matrix whose product with unit-variance inputs has about unit variance."""
    return (
        torch.randn(b, m // b, r, **like) * r**-0.5,
        torch.randn(b, b, r, **like),
        torch.randn(b, n // b, r, **like) * n**-0.5,
    )


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


# ---- parity ------------------------------------------------------------------------------------


def parity(case: Setup) -> list[dict[str, Any]]:
    """Forward and gradients against float64, tuned as they will be timed.

    Raises:
        SystemExit: an error above TOLERANCE, or NaN; nothing is timed then.
    """
    rows = []
    m, n = case.shapes[0]
    many = min(300, max(case.tokens))
    grid = [(case.dtype, b, tokens) for b in case.blocks for tokens in (1, 7, many)]
    others = [dtype for dtype in TOLERANCE if dtype != case.dtype]  # slow to compile and tune
    grid += [(dtype, max(case.blocks[:2]), tokens) for dtype in others for tokens in (1, 7)]
    for dtype, b, tokens in grid:
        rows.append(_parity(m, n, b, case.rank(m, n, b, 0.3), tokens, dtype, case))
    bad = [row for row in rows if not all(e <= row["tolerance"] for e in row["errors"].values())]
    print(f"parity: {len(rows) - len(bad)} of {len(rows)} cases within tolerance", flush=True)
    if bad:
        raise SystemExit(f"wrong results: {bad}")
    return rows


def _parity(
    m: int, n: int, b: int, r: int, tokens: int, dtype: torch.dtype, case: Setup
) -> dict[str, Any]:
    like = {"device": case.device, "dtype": dtype}
    tensors = (torch.randn(tokens, n, **like), *factors(m, n, b, r, like))
    grad = torch.randn(tokens, m, **like)
    x, u, s, v = (t.double().requires_grad_() for t in tensors)
    y = x @ to_dense(u, s, v).T
    y.backward(grad.double())
    errors = {"y": relative_error(kernel.forward(*tensors), y.detach())}
    found = kernel.backward(grad, *tensors, (True, True, True, True))
    for name, value, exact in zip(("x", "u", "s", "v"), found, (x, u, s, v), strict=True):
        errors[f"d{name}"] = relative_error(value, exact.grad)
    return {
        "m": m, "n": n, "b": b, "r": r, "tokens": tokens, "dtype": str(dtype),
        "errors": errors, "tolerance": TOLERANCE[dtype],
    }  # fmt: skip


# ---- ceilings ----------------------------------------------------------------------------------


def ceilings(case: Setup) -> dict[str, float]:
    """Bytes per second of a large copy (read plus written), FLOP per second of a large product."""
    size = 8192 if case.device.type == "cuda" else 64
    like = {"device": case.device, "dtype": case.dtype}
    a, b = torch.randn(size, size, **like), torch.randn(size, size, **like)
    source = torch.randn(size, size * 8, **like)
    target = torch.empty_like(source)
    # Not copy_: in a graph it becomes a copy by the copy engine, a third slower than a kernel.
    calls = {
        "copy": [lambda: torch.neg(source, out=target)],
        "matmul": [lambda: torch.mm(a, b)],
    }
    times = measure(calls, case)
    return {
        "copy_bytes_per_s": 2 * source.nbytes / (times["copy"]["median"] * 1e-6),
        "matmul_flop_per_s": 2 * size**3 / (times["matmul"]["median"] * 1e-6),
    }


# ---- timing ------------------------------------------------------------------------------------


def measure(
    contenders: dict[str, list[Callable[[], object]]], case: Setup
) -> dict[str, dict[str, float]]:
    """Microseconds per call of each contender, a list of calls to rotate through."""
    runs = {name: _runner(calls, case.device) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(case.rounds):
        # Every other round in reverse, so that no contender always follows the same one.
        for name in list(runs)[:: 1 if round_ % 2 else -1]:
            times[name].append(runs[name]())
    return {
        name: dict(
            zip(
                ("p10", "median", "p90"), np.percentile(values, (10, 50, 90)).tolist(), strict=True
            )
        )
        for name, values in times.items()
    }


def _runner(calls: list[Callable[[], object]], device: torch.device) -> Callable[[], float]:
    """A function that runs the calls in rotation and returns microseconds per call."""
    for call in calls:
        call()  # tunes, compiles, and fills cuBLAS's workspace before the capture
    if device.type != "cuda":
        return lambda: _clock(calls) / len(calls) * 1e6
    torch.cuda.synchronize(device)
    # How often: by the time of a replay.  That of plain calls is Python's, many times as long for
    # a small BLAST layer, whose graph would then be so short that its launch shows.
    turns = max(1, math.ceil(GRAPH_SECONDS / (_captured(calls, 1, device)() * len(calls) * 1e-6)))
    run = _captured(calls, turns, device)
    run()
    return run


def _captured(
    calls: list[Callable[[], object]], turns: int, device: torch.device
) -> Callable[[], float]:
    """A graph of `turns` rotations; microseconds per call of a replay by the device's clock."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for call in calls:
                call()
    delay, timed = flusher("cuda-graph", device), device_timer("cuda-graph")

    def run() -> float:
        delay("graph")
        return timed(graph.replay) / (turns * len(calls))

    return run


def _clock(calls: list[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copies(weight_bytes: int, device: torch.device) -> int:
    """Enough sets of weights to exceed the L2 cache twice."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(2 * cache / weight_bytes) + 1)


# ---- layers ------------------------------------------------------------------------------------


def layers(
    case: Setup, limits: dict[str, float], keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """The layer table: one row per shape, token count, block count and ratio.

    Args:
        keep: called with all rows so far, so that a run that is cut off leaves them.
    """
    rows: list[dict[str, Any]] = []
    for m, n in case.shapes:
        for tokens in case.tokens:
            rows += _layer(m, n, tokens, case, limits)
            last = rows[-1]
            keep(rows)
            print(f"{m}x{n} T={tokens}: dense {last['dense']['median']:.1f} us", flush=True)
    return rows


def _layer(
    m: int, n: int, tokens: int, case: Setup, limits: dict[str, float]
) -> list[dict[str, Any]]:
    like = {"device": case.device, "dtype": case.dtype}
    x = torch.randn(tokens, n, **like)
    twin = nn.Linear(n, m, bias=False, **like)
    size = x.element_size()
    contenders: dict[str, list[Callable[[], object]]] = {}
    errors: dict[tuple[int, int], float] = {}
    equal: dict[tuple[int, float], int] = {}  # low rank's rank of about as many multiply-adds

    def dense() -> Callable[[], object]:
        weight = torch.randn(m, n, **like) * n**-0.5
        return lambda: F.linear(x, weight)

    def low_rank(rank: int) -> Callable[[], object]:
        down, up = torch.randn(rank, n, **like) * n**-0.5, torch.randn(m, rank, **like)
        return lambda: F.linear(F.linear(x, down), up)

    def blast(b: int, rank: int) -> Callable[[], object]:
        layer = BlastLinear.empty_like(twin, b, rank)
        u, s, v = factors(m, n, b, rank, like)
        layer.U.copy_(u)
        layer.V.copy_(v)
        if b > 1:  # low rank has couplings of one, and saves a launch
            layer.S.copy_(s)
        if (b, rank) not in errors:
            errors[b, rank] = _sampled_error(x, layer)
        return lambda: layer(x)

    def add(name: str, parameters: int, make: Callable[[], Callable[[], object]]) -> None:
        contenders[name] = [make() for _ in range(copies(parameters * size, case.device))]

    add("dense", m * n, dense)
    grid = [(b, ratio) for b in case.blocks for ratio in case.ratios]
    for b, ratio in grid:
        rank = case.rank(m, n, b, ratio)
        macs = rank * (m + n + b * b)
        # In steps of 16, as BLAST's ranks: at odd ranks cuBLAS takes up to three times as long.
        equal[b, ratio] = rounded = max(1, round(macs / (m + n) / RANK_STEP)) * RANK_STEP
        add(f"lowrank {b} {ratio}", rounded * (m + n), lambda rank=rounded: low_rank(rank))
        add(f"blast {b} {ratio}", macs, lambda b=b, rank=rank: blast(b, rank))
    times = measure(contenders, case)

    def figure(name: str, macs: int) -> dict[str, float]:
        """A time beside its floor: reading weights and inputs once, or the multiply-adds."""
        flop, moved = 2 * tokens * macs, size * (macs + tokens * (m + n))
        seconds = times[name]["median"] * 1e-6
        of_copy = moved / seconds / limits["copy_bytes_per_s"]
        of_matmul = flop / seconds / limits["matmul_flop_per_s"]
        return {
            **times[name], "flop": flop, "bytes": moved, "of_copy": of_copy,
            "of_matmul": of_matmul, "of_roofline": max(of_copy, of_matmul),
        }  # fmt: skip

    rows = []
    for b, ratio in grid:
        rank = case.rank(m, n, b, ratio)
        macs = rank * (m + n + b * b)
        row: dict[str, Any] = {
            "m": m, "n": n, "tokens": tokens, "b": b, "ratio": ratio, "rank": rank,
            "macs_ratio": macs / (m * n), "error": errors[b, rank],
            "dense": figure("dense", m * n),
            "lowrank": figure(f"lowrank {b} {ratio}", equal[b, ratio] * (m + n)),
            "blast": figure(f"blast {b} {ratio}", macs),
        }  # fmt: skip
        row["speedup"] = row["dense"]["median"] / row["blast"]["median"]
        row["lowrank_speedup"] = row["dense"]["median"] / row["lowrank"]["median"]
        rows.append(row)
    return rows


def _sampled_error(x: Tensor, layer: BlastLinear) -> float:
    """The timed call on this very input, against float64 on about 64 of its rows.

    Raises:
        SystemExit: the error is above TOLERANCE, or NaN.
    """
    some = slice(None, None, max(1, len(x) // 64))
    dense = to_dense(layer.U.double(), layer.S.double(), layer.V.double())
    error = relative_error(layer(x)[some], x[some].double() @ dense.T)
    if not error <= TOLERANCE[x.dtype]:
        raise SystemExit(f"wrong result: error {error} at x {tuple(x.shape)}, {layer}")
    return error


def table(rows: list[dict[str, Any]]) -> str:
    """The layer table as Markdown; times in microseconds, in brackets the share of roofline."""
    heads = [
        "layer",
        "tokens",
        "b",
        "share",
        "dense",
        "low rank",
        "BLAST",
        "low rank x",
        "BLAST x",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * 4 + "|---:" * 5 + "|"]
    for row in rows:
        times = [
            f"{row[name]['median']:.1f} ({row[name]['of_roofline']:.0%})"
            for name in ("dense", "lowrank", "blast")
        ]
        cells = [f"{row['m']}x{row['n']}", row["tokens"], row["b"], row["ratio"], *times]
        cells += [f"{row['lowrank_speedup']:.2f}", f"{row['speedup']:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


# ---- report ------------------------------------------------------------------------------------


def circumstances(case: Setup, interpreted: bool) -> dict[str, Any]:
    cuda = case.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(case.device) if cuda else "cpu",
        "driver": _driver() if cuda else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "dtype": str(case.dtype).removeprefix("torch."),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "interpreted": interpreted,  # then the times mean nothing
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.split()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=("llama", "tiny"), default="llama")
    parser.add_argument("--interpret", action="store_true", help="Triton's interpreter, on a CPU")
    parser.add_argument("--out", type=Path, help="folder for layer.json")
    arguments = parser.parse_args()
    if not arguments.interpret and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --shapes tiny --interpret is the dry check on a CPU.")
    torch.manual_seed(0)
    started = time.perf_counter()
    case = setup(arguments.shapes, torch.device("cpu" if arguments.interpret else "cuda"))
    report = circumstances(case, arguments.interpret)
    slug = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    out = arguments.out or ROOT / "results" / "gpu" / slug
    report["parity"] = parity(case)
    report["ceilings"] = ceilings(case)
    out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        report["layers"] = layers(
            case,
            report["ceilings"],
            lambda rows: write_json(
                out / "layer.json", report | {"layers": rows, "finished": False}
            ),
        )
    report["choices"] = [
        {"kernel": name, "case": list(key), "choice": choice}
        for (name, key, _), choice in tune.chosen().items()
    ]
    report["seconds"] = time.perf_counter() - started
    write_json(out / "layer.json", report | {"finished": True})
    print(table(report["layers"]))
    print(f"{report['seconds']:.0f} s; wrote {out / 'layer.json'}")


if __name__ == "__main__":
    main()
