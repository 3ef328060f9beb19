"""How long single layers take on this device (cells), and what the device is.

Everything is timed side by side in one process, interleaved round by round, so that clock
changes and other load hit all contenders alike; medians with spread are reported.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from blast_search import kernels
from blast_search.files import sha256_json
from blast_search.matrix import BlastLinear
from blast_search.modes import device_timer, float32_products, flusher, timed_call
from blast_search.noise import (
    NARROW,
    WIDE,
    OtherLoad,
    half_width,
    median_interval,
    processors,
)
from blast_search.space import Candidate, LayerSpec, SearchSpace
from blast_search.tables import Cell, LatencyTable, Measurement

WARMUP = 3
CELL_SECONDS = 0.4  # at most, per attempt; a steady cell needs a fraction
CELL_ATTEMPTS = 2
MIN_ROUNDS, MAX_ROUNDS = 12, 200
CHECK_ROUNDS = 8  # how often a cell asks whether it has enough


def environment(device: torch.device) -> dict[str, Any]:
    """What a latency depends on, and what a reader of a result wants to know."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    else:
        name, capability = _cpu_name(), torch.backends.cpu.get_cpu_capability()
    precision = {"float32": float32_products()} if device.type == "cuda" else {}
    return precision | {
        "device": name,
        "device_type": device.type,
        "capability": capability,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "processors": processors() if device.type == "cpu" else 0,
        "torch": str(torch.__version__),  # a subclass of str that YAML cannot write
        "cuda": torch.version.cuda or "" if device.type == "cuda" else "",
        "driver": _driver() if device.type == "cuda" else "",
        "compiler": kernels.compiler(device.type),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def describe(device_type: str, dtype: str) -> dict[str, Any]:
    """The environment that a run records and a worker compares: its fingerprint is a table's."""
    return environment(torch.device(device_type)) | {"dtype": dtype}


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    return next((word for word in text.split() if re.fullmatch(r"\d+(\.\d+)+", word)), "")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.machine()}, {os.cpu_count()} cores"


def fingerprint(env: Mapping[str, Any]) -> str:
    """Short digest: tables with different fingerprints are never mixed."""
    return sha256_json({key: env[key] for key in sorted(env) if key != "python"})[:12]


def synchronizer(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def interleave(
    calls: Mapping[str, Callable[[], object]],
    synchronize: Callable[[], None],
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    prepare: Callable[[str], None] = lambda name: None,
    best_of: int = 1,
    enough: Callable[[Mapping[str, list[float]]], bool] = lambda samples: False,
    clock: Callable[[], int] = time.perf_counter_ns,
    timed: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, np.ndarray]:
    """Microseconds of every call, one sample per round: A B C, B C A, C A B, ...

    `prepare(name)` runs untimed before each contender's turn.  A sample is the faster of
    `best_of` calls in a row.  Rounds go on for `seconds`, within the limits, or until `enough`,
    asked every CHECK_ROUNDS rounds.  `timed` makes a call and gives its microseconds; default:
    by `clock`, between two calls of `synchronize`.
    """

    def by_clock(call: Callable[[], object]) -> float:
        synchronize()
        begin = clock()
        call()
        synchronize()
        return (clock() - begin) / 1e3

    timed = timed or by_clock
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(WARMUP):
            prepare(name)
            calls[name]()
    synchronize()
    started, done = clock(), 0
    while done < min_rounds or (done < max_rounds and clock() - started < seconds * 1e9):
        for name in names[done % len(names) :] + names[: done % len(names)]:
            prepare(name)
            samples[name].append(min(timed(calls[name]) for _ in range(best_of)))
        done += 1
        if done >= min_rounds and done % CHECK_ROUNDS == 0 and enough(samples):
            break
    return {name: np.array(values) for name, values in samples.items()}


def kernel_label(c: Candidate, dtype: torch.dtype, device_type: str, tokens: int) -> str:
    if c.is_dense:
        return "dense"
    return kernels.label(kernels.choose(c.num_blocks, c.rank, dtype, device_type, tokens))


def cells_for(
    layers: Iterable[LayerSpec],
    space: SearchSpace,
    device: str,
    dtype: torch.dtype,
    kind: str,
    mode: str = "eager",
) -> list[Cell]:
    """The distinct cells of a grid; layers of equal shape, bias and token count share them."""
    return list(
        dict.fromkeys(
            Cell(
                device,
                mode,
                str(dtype).removeprefix("torch."),
                kernel_label(c, dtype, kind, call.tokens),
                *layer.shape,
                layer.bias,
                call.tokens,
                c,
            )
            for layer in layers
            for c in space.candidates(layer)
            for call in layer.calls
        )
    )


def measure_cell(cell: Cell, device_type: str, seconds: float = CELL_SECONDS) -> Measurement:
    """Time one candidate interleaved with its dense twin on random weights and inputs.

    Repeats until the interval of the ratio is narrow, for at most `seconds`; what is very
    uncertain then is tried again (other load often passes), and the best attempt counts.
    """
    device, dtype = torch.device(device_type), getattr(torch, cell.dtype)
    n, m = cell.in_features, cell.out_features
    new: dict[str, Any] = {"device": device, "dtype": dtype}
    x = torch.randn(cell.tokens, n, **new)
    dense = nn.Linear(n, m, cell.bias, **new)
    modules: dict[str, nn.Module] = {"dense": dense}
    if not cell.candidate.is_dense:
        c = cell.candidate
        modules["candidate"] = BlastLinear.empty_like(dense, c.num_blocks, c.rank)
    with torch.inference_mode():
        calls = {
            name: timed_call(cell.mode, module, lambda layer: layer(x))
            for name, module in modules.items()
        }
    flush, timed = flusher(cell.mode, device), device_timer(cell.mode)
    attempts = []
    for _ in range(CELL_ATTEMPTS):
        load = OtherLoad()
        with torch.inference_mode():
            times = interleave(
                calls, synchronizer(device), seconds, prepare=flush, enough=_narrow, timed=timed
            )
        attempts.append(_measurement(times, load.share()))
        if attempts[-1].uncertainty <= 2 * WIDE:  # steady, or as noisy as this device always is
            break
    return min(attempts, key=lambda m: m.uncertainty)


def _narrow(samples: Mapping[str, list[float]]) -> bool:
    return half_width(median_interval(_ratios(samples))) <= NARROW


def _ratios(samples: Mapping[str, Sequence[float] | np.ndarray]) -> np.ndarray:
    """Candidate / dense by round; for a dense cell, its times relative to their median."""
    dense = np.asarray(samples["dense"])
    if "candidate" in samples:
        return np.asarray(np.asarray(samples["candidate"]) / dense)
    return np.asarray(dense / np.median(dense))


def _measurement(times: Mapping[str, np.ndarray], other_load: float) -> Measurement:
    mine, ratios = times.get("candidate", times["dense"]), _ratios(times)
    p10, p50, p90 = np.percentile(mine, (10, 50, 90))
    # Of a dense cell it is 1: a median between two rounds would round it to a hair below.
    ratio = float(np.median(ratios)) if "candidate" in times else 1.0
    return Measurement(
        float(p50), float(p10), float(p90), len(mine), float(np.median(times["dense"])),
        ratio, *median_interval(ratios), round(other_load, 3),
    )  # fmt: skip


def missing_cells(table: LatencyTable, cells: Iterable[Cell]) -> list[Cell]:
    """What is still to be measured: the grid minus the cells on file."""
    return [cell for cell in cells if cell not in table.cells]
