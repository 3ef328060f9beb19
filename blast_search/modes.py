"""How a call is made when it is timed: as the model will run, or its latency says little.

"eager" is a plain call; "compiled" goes through torch.compile (static shapes); "cuda-graph" is
captured once and replayed, which takes the launches out of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from blast_search.errors import UsageError

MODES = ("eager", "compiled", "cuda-graph")
GRAPH_WARMUP = 3  # side-stream calls before a capture, as PyTorch asks for
VARIANTS = 64  # compiled side by side: the default, 8, would fall back to eager calls in silence


def check_mode(mode: str, device_type: str) -> None:
    """Raise UsageError for an unknown mode, or one that the device does not have."""
    if mode not in MODES:
        raise UsageError(f"mode is {mode!r}, expected one of {', '.join(MODES)}.")
    if mode == "cuda-graph" and device_type != "cuda":
        raise UsageError("mode cuda-graph needs a CUDA device. Use --mode eager or compiled.")


def timed_call(mode: str, module: nn.Module, call: Callable[[nn.Module], object]) -> Any:
    """A function without arguments that does `call(module)` in a mode, to be timed.

    What compiling and capturing need happens here, not in the function.  `module` may be changed
    afterwards: compiled calls keep a copy of its structure (sharing its weights), graphs the
    addresses of what they were captured with.

    Raises:
        RuntimeError: the call cannot be compiled or captured.
    """
    if mode == "eager":
        return lambda: call(module)
    if mode == "compiled":
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
    with torch.cuda.graph(graph):
        output = call(module)
    held = (output, [p for p in module.parameters()])  # addresses that the graph reads and writes

    def replay() -> object:
        graph.replay()
        return held[0]

    return replay


def _structure(module: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the same tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in tensors})
