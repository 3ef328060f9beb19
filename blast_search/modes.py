"""How a call is made when it is timed: as the model will run, or its latency says little.

"eager" is a plain call; "compiled" goes through torch.compile (static shapes); "cuda-graph" is
captured once and replayed, which takes the launches out of the time.  With "-cold" behind the
name, cells are timed with a flushed cache: every call reads its weights from memory, as it does
in a model larger than the cache.  (Whole models are never flushed: they do that to themselves.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blast_search.errors import UsageError

COLD = "-cold"
CALLS = ("eager", "compiled", "cuda-graph")
MODES = (*CALLS, *(call + COLD for call in CALLS))
CACHE_BYTES = 64 << 20  # where the size of the last-level cache is not told
GRAPH_WARMUP = 3  # side-stream calls before a capture, as PyTorch asks for
LAUNCH_CYCLES = 200_000  # 100 us and more: longer than the launch of a graph
VARIANTS = 64  # compiled side by side: the default, 8, would fall back to eager calls in silence


def check_mode(mode: str, device_type: str) -> None:
    """Raise UsageError for an unknown mode, or one that the device does not have."""
    if mode not in MODES:
        raise UsageError(f"mode is {mode!r}, expected one of {', '.join(MODES)}.")
    if mode.startswith("cuda-graph") and device_type != "cuda":
        raise UsageError("mode cuda-graph needs a CUDA device. Use --mode eager or compiled.")


def timed_call(
    mode: str, module: nn.Module, call: Callable[[nn.Module], object], pool: Any = None
) -> Any:
    """A function without arguments that does `call(module)` in a mode, to be timed.

    What compiling and capturing need happens here, not in the function.  `module` may be changed
    afterwards: compiled calls keep a copy of its structure (sharing its weights), graphs the
    addresses of what they were captured with.

    Args:
        pool: of graphs that are never replayed at once (torch.cuda.graph_pool_handle): they share
            their memory, and nothing is returned.

    Raises:
        RuntimeError: the call cannot be compiled or captured.
    """
    how = mode.removesuffix(COLD)
    if how == "eager":
        return lambda: call(module)
    if how == "compiled":
        mine = _structure(module)
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, VARIANTS)
        mine.compile(dynamic=False)
        call(mine)
        return lambda: call(mine)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(GRAPH_WARMUP):
            call(module)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = call(module)
    # Addresses that the graph reads and writes.
    held = (None if pool else output, [*module.parameters(), *module.buffers()])
    del output

    def replay() -> object:
        graph.replay()
        return held[0]

    return replay


def shared_pool(mode: str) -> Any:
    """Memory for all graphs of a mode that captures (`timed_call`), else None."""
    return torch.cuda.graph_pool_handle() if mode.startswith("cuda-graph") else None  # type: ignore[no-untyped-call]


def float32_products() -> str:
    """How CUDA multiplies float32: "tf32" or "ieee".

    PyTorch's older getters raise where this was set through the newer attribute.
    """
    products = torch.backends.cuda.matmul
    precision = getattr(products, "fp32_precision", None)  # from PyTorch 2.9 on
    allowed = products.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def set_float32_products(precision: str) -> None:
    """As `float32_products` has it; what is so already is left alone."""
    if precision == float32_products():
        return
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = precision
    else:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


@contextmanager
def exact_products() -> Iterator[None]:
    """Within it, float32 products are IEEE ones, whatever TF32 or autocast made of them."""
    precision = float32_products()
    set_float32_products("ieee")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        set_float32_products(precision)


def flusher(mode: str, device: torch.device, cycles: int = LAUNCH_CYCLES) -> Callable[[str], None]:
    """What to do, untimed, before each timed call of a cell: nothing, or empty the caches.

    Before a graph the device is also kept busy for some cycles, so that it never waits for the
    launch.
    """
    cold = mode.endswith(COLD)
    size = 2 * _cache_bytes(device) if cold else 0
    buffer = torch.zeros(size // 4, dtype=torch.float32, device=device)

    def flush(name: str) -> None:
        # Read, not written: what is written has to leave the cache again, in the timed call.
        if cold:
            buffer.amax()
        if mode.startswith("cuda-graph"):
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]

    return flush


def device_timer(mode: str) -> Callable[[Callable[[], object]], float] | None:
    """Microseconds of a call by the GPU's own clock, for cells in graph mode; else None.

    A graph of one layer takes as long as its launch and a host's synchronisation; inside a model
    it is part of one large graph, where neither is paid.  Whole models are timed by the host.
    """
    if not mode.startswith("cuda-graph"):
        return None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def timed(call: Callable[[], object]) -> float:
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    return timed


def _cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 0)
        sizes += [int(text[:-1]) * unit] if unit and text[:-1].isdecimal() else []
    return max(sizes, default=CACHE_BYTES)


def _structure(module: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the same tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in tensors})
