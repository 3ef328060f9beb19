"""The Ray side of where work is done: attaching to a cluster, and choosing its nodes.

A run measures one kind of device, the driver's.  Each node says what its device is, and the
nodes whose fingerprint is the one wanted take part; BLAST_SEARCH_RAY_RESOURCE narrows them to an
accelerator type or a custom resource.  See docs/clusters.md.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blast_search.errors import BlastSearchError, UsageError
from blast_search.latency import describe, fingerprint
from blast_search.modes import float32_products, set_float32_products

RESOURCE = "BLAST_SEARCH_RAY_RESOURCE"
ANSWER_SECONDS = 60.0  # a node that is busy for longer is left out


@dataclass(frozen=True)
class Places:
    """Where trials run: what each takes (a whole device), and on which nodes."""

    resources: Mapping[str, float]
    nodes: tuple[str, ...]  # Ray's node ids


@contextmanager
def attached(address: str | None) -> Iterator[None]:
    """The cluster of --ray-address or RAY_ADDRESS, one that is attached, or a local Ray.

    Raises:
        UsageError: an address of Ray's client protocol. BlastSearchError: nobody answers there.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        _probe(address)
        # Nodes need the dependencies, not the package: they measure with the driver's own code.
        package = Path(__file__).parent
        ship = {"py_modules": [str(package)], "excludes": ["**/tasks/data/", "**/__pycache__/"]}
        options |= {"address": address, "runtime_env": ship}
    else:
        # A new Ray of our own, even if RAY_ADDRESS-less cluster files lie around.
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
            "num_cpus": os.cpu_count(),
            # Ray asks NVML, which a container may lack where CUDA works.
            "num_gpus": torch.cuda.device_count(),
        }
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # Ray lowers the priority of its workers: beside any other load they would measure too much.
    os.environ.setdefault("RAY_worker_niceness", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ray.init(**options)
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Ray itself tries an address where nothing listens for two minutes; we try two seconds."""
    if address.startswith("ray://"):
        raise UsageError(
            f"{address} is Ray's client protocol, which hides the results of Tune until its end. "
            "Run on a node of the cluster (or by `ray job submit`), with --ray-address HOST:PORT "
            "or auto."
        )
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return  # "auto": Ray finds the cluster, or says at once that there is none
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError as error:
        raise BlastSearchError(
            f"no Ray cluster answers at {address} ({error}). Start one with `ray start --head`, "
            "correct --ray-address / RAY_ADDRESS, or use --workers local."
        ) from None


def describe_as(device_type: str, dtype: str, threads: int, float32: str) -> dict[str, Any]:
    """A process's environment once it computes as the driver does."""
    torch.set_num_threads(threads)
    set_float32_products(float32)
    return describe(device_type, dtype)


def places(device: str, dtype: str, device_type: str, say: Callable[[str], None]) -> Places:
    """The nodes whose device has the fingerprint `device`.

    Each node is asked with its whole device reserved, as a trial will reserve it: a share of a
    GPU, or some of the cores, would let trials time each other.

    Raises:
        BlastSearchError: none, naming what there is.
    """
    found, absent = _ask(dtype, device_type)
    alike = {node: size for node, (env, size) in found.items() if fingerprint(env) == device}
    others = [f"{_name(node)} has {env['device']}" for node, (env, _) in found.items()
              if node not in alike]  # fmt: skip
    left_out = others + [f"{_name(node)} {why}" for node, why in absent.items()]
    if not alike:
        wanted = os.environ.get(RESOURCE)
        raise BlastSearchError(
            f"no node of the Ray cluster can measure for the {device_type} device of this process"
            f"{f' with {RESOURCE}={wanted}' if wanted else ''}: "
            f"{_list(left_out) or 'no node offers one'}. Run on a node of the kind to measure "
            "(docs/clusters.md), with the same versions and thread count."
        )
    # Nodes of one kind that declare fewer CPUs than others keep some for something else.
    most = max(alike.values())
    chosen = tuple(node for node, size in alike.items() if size == most)
    left_out += [f"{_name(node)} has {size:g} of {most:g} CPUs" for node, size in alike.items()
                 if size != most]  # fmt: skip
    if left_out:
        say(f"measuring on {len(chosen)} nodes of the Ray cluster; not on: {_list(left_out)}")
    resources = {"CPU": 1.0, "GPU": 1.0} if device_type == "cuda" else {"CPU": most}
    return Places(resources, chosen)


def _ask(
    dtype: str, device_type: str
) -> tuple[dict[str, tuple[dict[str, Any], float]], dict[str, str]]:
    """Environment and size of the device by node, and why other nodes gave no answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    kind, wanted = ("GPU" if device_type == "cuda" else "CPU"), os.environ.get(RESOURCE)
    asked: dict[Any, tuple[str, float]] = {}
    ask = ray.remote(max_retries=0)(describe_as)
    for node in ray.nodes():
        has = node["Resources"]
        if not (node["Alive"] and has.get(kind, 0) >= 1):
            continue
        if wanted and not {wanted, f"accelerator_type:{wanted}"} & set(has):
            continue
        size = 1.0 if kind == "GPU" else float(has[kind])
        whole = {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": size}
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ask.options(**whole, scheduling_strategy=place)
        reference = task.remote(device_type, dtype, torch.get_num_threads(), float32_products())
        asked[reference] = (node["NodeID"], size)
    if not asked:
        return {}, {}
    done, pending = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    found, absent = {}, {asked[reference][0]: "is busy" for reference in pending}
    for reference in done:
        node, size = asked[reference]
        try:
            found[node] = (ray.get(reference), size)
        except ray.exceptions.RayError as error:  # the node left, or lacks a dependency
            absent[node] = f"cannot measure ({str(error).strip().splitlines()[-1]})"
    for reference in pending:
        ray.cancel(reference, force=True)
    return found, absent


@dataclass(frozen=True)
class Seat:
    """A place for one worker that holds a whole model: on which node, and what it takes."""

    node: str
    resources: Mapping[str, float]  # num_cpus, num_gpus
    threads: int


def seats(nodes: Sequence[str], device_type: str) -> list[Seat]:
    """One per GPU of these nodes; of CPUs, as many as cores and memory allow.

    Nothing is timed there, so a node's cores may be shared.  A worker is taken to need what this
    process has needed so far.
    """
    import ray

    need = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = []
    for node in ray.nodes():
        has, kind = node["Resources"], "GPU" if device_type == "cuda" else "CPU"
        if not (node["Alive"] and node["NodeID"] in nodes):
            continue
        count = int(has.get(kind, 0))
        if kind == "CPU":
            count = min(count, int(has.get("memory", 0) // need))
        threads = max(1, int(has.get("CPU", 1)) // max(1, count))
        takes = {"num_cpus": 0, "num_gpus": 1} if kind == "GPU" else {"num_cpus": threads}
        found += [Seat(node["NodeID"], takes, threads)] * count
    return found


def _name(node_id: str) -> str:
    import ray

    return next(
        (n["NodeManagerHostname"] for n in ray.nodes() if n["NodeID"] == node_id), node_id[:8]
    )


def _list(parts: list[str], most: int = 6) -> str:
    more = f" and {len(parts) - most} more" if len(parts) > most else ""
    return "; ".join(parts[:most]) + more
