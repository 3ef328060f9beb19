"""Measured choices between kernel configs, kept on disk.

Triton's own autotuner chooses between configs of one kernel. Here cuBLAS and whole plans are
candidates too, a call under CUDA graph capture must not measure, and a decode call cannot afford
the autotuner's per-call work; so the choice is a table of its own, timed by Triton's do_bench.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from blast_search.files import write_json
from blast_search.latency import environment, fingerprint

T = TypeVar("T")
MILLISECONDS = {"warmup": 3, "rep": 15}  # per candidate

_chosen: dict[tuple[str, tuple[Hashable, ...], torch.device], Any] = {}


def pick(
    name: str,
    case: tuple[Hashable, ...],
    candidates: Sequence[T],
    run: Callable[[T], object],
    device: torch.device,
) -> T:
    """The fastest candidate for a case; measured once per device and kernel source.

    The first candidate is taken unmeasured where nothing can be timed: off CUDA (Triton's
    interpreter) and, until the case was tuned, while a CUDA graph is being captured.

    Args:
        name: what is chosen. case: what the choice depends on, of plain values.
        candidates: JSON values. run: runs one, and may overwrite its result.

    Raises:
        RuntimeError: no candidate fits the device.
    """
    known = (name, case, device)
    if known in _chosen:
        choice: T = _chosen[known]
        return choice
    if device.type != "cuda" or len(candidates) == 1:
        return candidates[0]
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]
    path, key = cache_path(device), repr((name, case))
    kept = _read(path).get(key)
    if kept in candidates:
        choice = candidates[candidates.index(kept)]
    else:
        times = [_milliseconds(run, candidate) for candidate in candidates]
        if min(times) == float("inf"):
            raise RuntimeError(f"no config of {name} fits this device for {case}.")
        choice = candidates[times.index(min(times))]
        # Read again: another process may have added its choices meanwhile.
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**_read(path), key: choice})
    _chosen[known] = choice
    return choice


def chosen() -> dict[tuple[str, tuple[Hashable, ...], torch.device], Any]:
    """What this process chose by measurement so far: (name, case, device) -> candidate."""
    return dict(_chosen)


def _milliseconds(run: Callable[[T], object], candidate: T) -> float:
    try:
        time = triton.testing.do_bench(
            lambda: run(candidate), return_mode="median", **MILLISECONDS
        )
    except Exception:
        # Too little shared memory, or a config that this version of Triton cannot compile: the
        # other ones will do.  An error that the device does not recover from shows here again.
        torch.cuda.synchronize()
        return float("inf")
    return float(time)


def _read(path: Path) -> dict[str, Any]:
    """The table at `path`; empty where it is missing or damaged, as it can be measured again."""
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


@cache
def cache_path(device: torch.device) -> Path:
    """$XDG_CACHE_HOME/blast-search/triton-<device, versions and kernel source>.json."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    source = Path(__file__).with_name("triton_kernels.py").read_bytes()
    digest = hashlib.sha256(source + triton.__version__.encode()).hexdigest()[:8]
    return Path(base) / "blast-search" / f"triton-{fingerprint(environment(device))}-{digest}.json"
