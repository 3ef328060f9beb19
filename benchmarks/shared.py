"""Time layers that share an input (q, k, v; gate, up) as one product, in a whole model.

    python benchmarks/shared.py minilm smollm2

BLAST layers of equal b on one x are, for z and w, one layer whose V and S are joined along the
rank.  The first layer called computes w for all of them; each multiplies its own part with its U.
Here the groups are known and nothing is checked, as it would have to be in the library: what this
gains is the most that such a path can gain.  Dense, separate and shared run interleaved, with
random factors.  Writes results/layer/shared-<threads>t.csv.
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
from blast_search.kernels import CPU_CHUNK, coupling
from blast_search.latency import environment, interleave
from blast_search.layers import Workload, get_modules, inventory, set_modules, stubs
from blast_search.space import LayerSpec, SearchSpace
from blast_search.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = (1, 4)
KEEP = 0.3


def rank_of(m: int, n: int, b: int) -> int:
    """As in the default search space: a multiple of 8."""
    return max(8, round(KEEP * m * n / (m + n + b * b) / 8) * 8)


class Group:
    """Layers of equal b and input, whose w is computed together."""

    def __init__(self, layers: list[BlastLinear]) -> None:
        self.v = torch.cat([layer.V.detach() for layer in layers], 2).contiguous()
        self.s = torch.cat([layer.S.detach() for layer in layers], 2).contiguous()
        self.x: Tensor | None = None
        self.left = self.size = len(layers)
        self.w: list[Tensor] = []

    def take(self, x: Tensor) -> list[Tensor]:
        """w (b, T, all ranks) of x (..., n), in chunks of the tokens."""
        if x is not self.x:
            self.x, self.left = x, self.size
            self.w = self._compute(x.reshape(-1, x.shape[-1]))
        w = self.w
        self.left -= 1
        if not self.left:
            self.x, self.w = None, []
        return w

    def _compute(self, rows: Tensor) -> list[Tensor]:
        b, q, _ = self.v.shape
        if b == 1:
            return [(rows @ self.v[0]).mul_(self.s.view(-1))]
        blocks = rows.view(len(rows), b, q).transpose(0, 1)
        return [
            coupling("numba").couple(torch.bmm(blocks[:, i : i + CPU_CHUNK], self.v), self.s)
            for i in range(0, len(rows), CPU_CHUNK)
        ]


class Member(nn.Module):
    """One layer of a group: ranks first .. last of the joined w belong to it."""

    def __init__(self, layer: BlastLinear, group: Group, first: int) -> None:
        super().__init__()
        self.layer, self.group = layer, group
        self.part = slice(first, first + layer.rank)

    def forward(self, x: Tensor) -> Tensor:
        w = self.group.take(x)
        own = self.layer._parameters
        u, bias = own["U"], own["bias"]
        b, p, _ = u.shape
        if b == 1:
            y = nn.functional.linear(w[0][:, self.part], u[0], bias)
        else:
            y = x.new_empty(x.numel() // x.shape[-1], b, p)
            for i, chunk in enumerate(w):
                part = torch.bmm(chunk[:, :, self.part], u.mT).transpose(0, 1)
                rows = y[i * CPU_CHUNK : (i + 1) * CPU_CHUNK]
                if bias is None:
                    rows.copy_(part)
                else:
                    torch.add(part, bias.view(b, p), out=rows)
        return y.view(*x.shape[:-1], b * p)


def find_groups(
    model: nn.Module, layers: list[LayerSpec], batch: Any
) -> list[list[str]]:
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
        members = [modules[name] for name in names]
        group, first = Group(members), 0
        for name, layer in zip(names, members, strict=True):
            result[name] = Member(layer, group, first)
            first += layer.rank
    return result


def measure(task: Any, b: int, batch: Any, seconds: float) -> dict[str, Any]:
    model = task.model().eval()
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
        "fixed": stubs(layers),
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
    fixed = np.median(times["fixed"])
    gain = times["shared"] / times["separate"]
    low, mid, high = np.percentile(gain, (10, 50, 90))
    return {
        "task": task.name, "num_blocks": b, "keep": KEEP, "tokens": layers[0].calls[0].tokens,
        "layers": len(modules), "in_groups": sum(map(len, groups)), "groups": len(groups),
        "rounds": len(gain),
        **{f"{name}_ms": f"{np.median(t) / 1e3:.2f}" for name, t in times.items()},
        "model_ratio": f"{mid:.3f}", "model_ratio_p10": f"{low:.3f}",
        "model_ratio_p90": f"{high:.3f}",
        "layers_ratio": f"{np.median((times['shared'] - fixed) / (times['separate'] - fixed)):.3f}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--shape", type=int, nargs=2, help="rows and tokens, not the workload's")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "layer")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    for name in arguments.tasks:
        task = load_task(name)
        batch = task.make_workload(*arguments.shape) if arguments.shape else task.workload()
        for b in arguments.blocks:
            rows.append(measure(task, b, batch, arguments.seconds))
            print(rows[-1], flush=True)
    env = environment(torch.device("cpu")) | {"date": datetime.now(UTC).date().isoformat()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / f"shared-{arguments.threads}t.csv").open("w") as stream:
        stream.write(f"# {json.dumps(env)}\n")
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
