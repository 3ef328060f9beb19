"""Measured choices between kernel configs, kept on disk.

Triton's own autotuner chooses between configs of one kernel. Here cuBLAS and whole plans are
candidates too, a call under CUDA graph capture must not measure, and a decode call cannot afford
the autotuner's per-call work; so the choice is a table of its own.

Candidates are compiled side by side and timed in turn behind a delay that hides their launches.
(Triton's do_bench takes 0.15 s for each decode kernel, and would time Python, not the kernel,
where a candidate is several launches.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from blast_search.files import write_json
from blast_search.kernels import label
from blast_search.latency import environment, fingerprint
from blast_search.modes import flusher

T = TypeVar("T")
ROUNDS = 15
# About half a millisecond.  With a fifth of it, candidates of several kernels (one of cuBLAS's two
# and a coupling) were timed by how fast Python launches them: for 64 tokens the wrong one won.
LAUNCH_CYCLES = 1_000_000

_chosen: dict[tuple[str, tuple[Hashable, ...], torch.device], Any] = {}


def pick(
    name: str,
    case: tuple[Hashable, ...],
    candidates: Sequence[T],
    run: Callable[[T], object],
    device: torch.device,
    nested: bool = False,
    capturing: T | None = None,
) -> T:
    """The fastest candidate for a case; measured once per device and kernel source.

    The first candidate is taken unmeasured where nothing can be timed: off CUDA (Triton's
    interpreter) and, unless the case was tuned before, while a CUDA graph is being captured.

    Args:
        name: what is chosen. case: what the choice depends on, of plain values.
        candidates: JSON values. run: runs one, and may overwrite its result.
        nested: `run` makes choices of its own, so that candidates must not run side by side.
        capturing: what to take instead of the first candidate within such a capture.

    Raises:
        Exception: no candidate fits the device; that of the last one.
    """
    known = (name, case, device)
    if known in _chosen:
        choice: T = _chosen[known]
        return choice
    if device.type != "cuda" or len(candidates) == 1:
        return candidates[0]
    path, key = cache_path(device), repr((name, case))
    kept = _read(path).get(key)
    if kept in candidates:
        choice = candidates[candidates.index(kept)]
    elif torch.cuda.is_current_stream_capturing():
        return candidates[0] if capturing is None else capturing
    else:
        times = _milliseconds(run, candidates, device, nested)
        choice = candidates[times.index(min(times))]
        # Read again: another process may have added its choices meanwhile.
        with suppress(OSError):  # no place to keep it: the next process tunes again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {**_read(path), key: choice})
    _chosen[known] = choice
    return choice


def chosen() -> dict[tuple[str, tuple[Hashable, ...], torch.device], Any]:
    """What this process chose by measurement so far: (name, case, device) -> candidate."""
    return dict(_chosen)


def _usable(
    run: Callable[[T], object],
    candidates: Sequence[T],
    nested: bool,
    state: Callable[[], AbstractContextManager[None]],
) -> list[bool]:
    """Which candidates run at all; side by side, so that they are compiled side by side.

    Args:
        state: entered around each run, as a thread's stream and modes are its own.

    Raises:
        Exception: that of the last candidate that failed, where all do.
    """
    problems: list[Exception] = []

    def works(candidate: T) -> bool:
        try:
            with state():
                run(candidate)
        except Exception as error:
            # Too little shared memory, or a config that this version of Triton cannot compile:
            # the other ones will do.  What the device does not recover from shows again later.
            problems.append(error)
            return False
        return True

    if nested:
        ready = [works(candidate) for candidate in candidates]
    else:
        with ThreadPoolExecutor(min(len(candidates), os.cpu_count() or 1)) as pool:
            ready = list(pool.map(works, candidates))
    if not any(ready):
        raise problems[-1]
    return ready


def _milliseconds(
    run: Callable[[T], object], candidates: Sequence[T], device: torch.device, nested: bool
) -> list[float]:
    """The time of each candidate on the device, its caches flushed; infinite where it fails.

    Medians of ROUNDS rounds in which all take turns: the clock of an idle device first rises.
    """
    inference, stream = torch.is_inference_mode_enabled(), torch.cuda.current_stream(device)

    @contextmanager
    def state() -> Iterator[None]:
        with torch.cuda.stream(stream), torch.no_grad(), torch.inference_mode(inference):
            yield

    ready = _usable(run, candidates, nested, state)
    torch.cuda.synchronize(device)
    try:
        delay = flusher("cuda-graph-cold", device, LAUNCH_CYCLES)
    except torch.OutOfMemoryError:  # a server that has filled its memory: timed with warm caches
        delay = flusher("cuda-graph", device, LAUNCH_CYCLES)
    fit = [i for i, fits in enumerate(ready) if fits]
    spans: list[list[tuple[Any, Any]]] = [[] for _ in candidates]
    for _ in range(ROUNDS):
        for i in fit:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            delay("")
            start.record()
            run(candidates[i])
            end.record()
            spans[i].append((start, end))
    torch.cuda.synchronize(device)
    return [median(s.elapsed_time(e) for s, e in own) if own else math.inf for own in spans]


def _read(path: Path) -> dict[str, Any]:
    """The table at `path`; empty where it is missing or damaged, as it can be measured again."""
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


@cache
def cache_path(device: torch.device) -> Path:
    """$XDG_CACHE_HOME/blast-search/triton-<device and versions>-<kernel source>.json."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    source = label("triton").removeprefix("triton-")
    return Path(base) / "blast-search" / f"triton-{fingerprint(environment(device))}-{source}.json"
