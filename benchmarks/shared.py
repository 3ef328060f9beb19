"""Time layers that share an input (q, k, v; gate, up) as one product, in a whole model.

    python benchmarks/shared.py minilm                # the task's workload
    python benchmarks/shared.py smollm2 --shape 1 32

BLAST layers of equal b on one x are, for z and w, one layer whose V and S are joined along the
rank.  The first layer called computes w for all of them; each multiplies its own part with its U.
For a few tokens the first layer called runs the one-call kernel ("small") for all of them.
Groups are found beforehand and nothing is checked, as it would have to be in the library (changed
inputs, parameters, threads): what this gains is about the most that such a path can gain.
Dense, separate and shared run interleaved in one process, with random factors.
Adds to results/layer/shared-<threads>t.csv; delete that file to start again.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blast_search import BlastLinear
from blast_search.batches import call_model
from blast_search.kernels import SMALL_TOKENS, coupling, small
from blast_search.latency import environment, interleave
from blast_search.layers import Workload, get_modules, inventory, set_modules, stubs
from blast_search.space import LayerSpec, SearchSpace
from blast_search.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = (1, 4)
KEEP = 0.3
CPU_CHUNK = 512  # tokens per pass


def rank_of(m: int, n: int, b: int) -> int:
    """As in the default search space: a multiple of 8."""
    return max(8, round(KEEP * m * n / (m + n + b * b) / 8) * 8)


class Group:
    """Layers of equal b and input, called together."""

    def __init__(self, layers: list[BlastLinear]) -> None:
        self.layers = layers
        self.v = torch.cat([layer.V.detach() for layer in layers], 2).contiguous()
        self.s = torch.cat([layer.S.detach() for layer in layers], 2).contiguous()
        ends = np.cumsum([layer.rank for layer in layers]).tolist()
        self.parts = [slice(e - x.rank, e) for e, x in zip(ends, layers, strict=True)]
        self.x: Tensor | None = None
        self.taken = 0
        self.found: list[Tensor] = []

    def take(self, index: int, x: Tensor) -> Tensor:
        """The output (T, m) of one layer for x (..., n)."""
        if x is not self.x:
            self.x, self.taken = x, 0
            self.found = self._first(x.reshape(-1, x.shape[-1]))
        found = self.found
        self.taken += 1
        if self.taken == len(self.layers):
            self.x, self.found = None, []
        tokens = x.numel() // x.shape[-1]
        return found[index] if tokens <= SMALL_TOKENS else self._last(index, found, tokens)

    def _first(self, rows: Tensor) -> list[Tensor]:
        """w (b, T, all ranks) in chunks of the tokens; for a few tokens, all outputs."""
        if len(rows) <= SMALL_TOKENS:
            owns = [layer._parameters for layer in self.layers]
            return [small.forward(rows, o["U"], o["S"], o["V"], o["bias"]) for o in owns]
        b, q, _ = self.v.shape
        if b == 1:
            return [(rows @ self.v[0]).mul_(self.s.view(-1))]
        blocks = rows.view(len(rows), b, q).transpose(0, 1)
        return [
            coupling("numba").couple(torch.bmm(blocks[:, i : i + CPU_CHUNK], self.v), self.s)
            for i in range(0, len(rows), CPU_CHUNK)
        ]

    def _last(self, index: int, w: list[Tensor], tokens: int) -> Tensor:
        """The last stage of one layer, as kernels.forward has it."""
        own, part = self.layers[index]._parameters, self.parts[index]
        u, bias = own["U"], own["bias"]
        b, p, _ = u.shape
        if b == 1:
            return nn.functional.linear(w[0][:, part], u[0], bias)
        y = u.new_empty(tokens, b, p)
        for i, chunk in enumerate(w):
            product = torch.bmm(chunk[:, :, part], u.mT).transpose(0, 1)
            rows = y[i * CPU_CHUNK : (i + 1) * CPU_CHUNK]
            if bias is None:
                rows.copy_(product)
            else:
                torch.add(product, bias.view(b, p), out=rows)
        return y.view(tokens, b * p)


class Member(nn.Module):
    """One layer of a group."""

    def __init__(self, group: Group, index: int) -> None:
        super().__init__()
        self.group, self.index = group, index

    def forward(self, x: Tensor) -> Tensor:
        return self.group.take(self.index, x).view(*x.shape[:-1], -1)


def find_groups(model: nn.Module, layers: list[LayerSpec], batch: Any) -> list[list[str]]:
    """Names of layers that were called with the very same tensor in one call of the model."""
    groups: dict[int, list[str]] = {}
    alive = []  # an id is unique only while its tensor lives

    def note(name: str, x: Tensor) -> None:
        alive.append(x)
        groups.setdefault(id(x), []).append(name)

    hooks = [
        module.register_forward_pre_hook(lambda _m, args, name=name: note(name, args[0]))
        for name, module in get_modules(model, layers).items()
    ]
    with torch.inference_mode():
        call_model(model, batch)
    for hook in hooks:
        hook.remove()
    return [names for names in groups.values() if len(names) > 1]


def shared(modules: Mapping[str, BlastLinear], groups: list[list[str]]) -> dict[str, nn.Module]:
    """The same layers, with those of a group sharing their first two stages."""
    result: dict[str, nn.Module] = dict(modules)
    for names in groups:
        group = Group([modules[name] for name in names])
        result |= {name: Member(group, index) for index, name in enumerate(names)}
    return result


def measure(model: nn.Module, batch: Any, b: int, seconds: float) -> dict[str, Any]:
    """One row of the result; the model is left as it was."""
    workload = Workload("", batch)
    layers, _ = inventory(model, [workload], SearchSpace())
    groups = find_groups(model, layers, batch)
    dense = get_modules(model, layers)
    fits = [x for x in layers if not x.in_features % b and not x.out_features % b]
    modules = {
        x.name: BlastLinear.empty_like(dense[x.name], b, rank_of(x.out_features, x.in_features, b))
        for x in fits
    }
    sets: dict[str, Mapping[str, nn.Module]] = {
        "dense": dense,
        "fixed": stubs(dense),
        "separate": dense | modules,
        "shared": dense | shared(modules, groups),
    }
    with torch.inference_mode():
        outputs = []
        for name in ("separate", "shared"):
            set_modules(model, layers, sets[name])
            output = call_model(model, batch)
            outputs.append(output if isinstance(output, Tensor) else output[0])
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
        times = interleave(
            dict.fromkeys(sets, lambda: call_model(model, batch)),
            lambda: None, seconds, max_rounds=400, best_of=2,
            prepare=lambda name: set_modules(model, layers, sets[name]),
        )  # fmt: skip
    set_modules(model, layers, dense)
    fixed, separate, joined = times["fixed"], times["separate"], times["shared"]
    return {
        "tokens": layers[0].calls[0].tokens, "num_blocks": b, "keep": KEEP,
        "layers": len(modules), "groups": len(groups), "in_groups": sum(map(len, groups)),
        "rounds": len(fixed),
        **{f"{name}_ms": f"{np.median(t) / 1e3:.2f}" for name, t in times.items()},
        **interval("model", joined / separate),
        **interval("layers", (joined - fixed) / (separate - fixed)),
    }  # fmt: skip


def interval(name: str, ratios: np.ndarray) -> dict[str, str]:
    """Shared over separate: the median over rounds and its 95 % bootstrap interval."""
    picks = np.random.default_rng(0).integers(0, len(ratios), (500, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
    values = {"": np.median(ratios), "_low": low, "_high": high}
    return {f"{name}_ratio{end}": f"{value:.3f}" for end, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--shape", type=int, nargs=2, help="rows and tokens, not the workload's")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "layer")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    task: Any = load_task(arguments.task)
    batch = task.make_workload(*arguments.shape) if arguments.shape else task.workload()
    env = environment(torch.device("cpu")) | {"dtype": "float32", "script": "shared.py"}
    date = {"task": task.name, "date": datetime.now(UTC).date().isoformat()}
    model = task.model().eval()
    rows = [date | measure(model, batch, b, arguments.seconds) for b in BLOCKS]
    for row in rows:
        print(row)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"shared-{arguments.threads}t.csv"
    fresh = not path.exists()
    with path.open("a") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        if fresh:
            stream.write(f"# {json.dumps(env)}\n")
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
