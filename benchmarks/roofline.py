"""What a device can give at best: the roofline of every layer of a published architecture.

    python benchmarks/roofline.py llama-7b --bytes 3.35e12 --flops 989e12    # H100 SXM, bfloat16

Nothing is measured: `--bytes` and `--flops` per second are a data sheet's, or the ceilings that
benchmarks/gpu.py measured ("ceilings" in layer.json).  A product takes at least the time to read
weights and inputs and write outputs once, or that of its multiply-adds; the last column is dense's
floor over BLAST's.  The last rows are all searched layers together.  See docs/gpu.md.
"""

from __future__ import annotations

import argparse

import torch

from blast_search.evaluate import workloads_of
from blast_search.layers import inventory
from blast_search.space import LayerSpec, SearchSpace
from blast_search.tasks.shapes import SHAPES, ShapesTask

BLOCKS, KEEPS, BYTES = (1, 4, 16), (0.5, 0.3), 2
WORKLOADS = "decode:1x1,decode16:16x1,prefill:1x2048"


def floor_us(tokens: int, params: int, sides: int, limits: tuple[float, float]) -> float:
    """Least time of a product with `params` weights, in microseconds."""
    moved, done = BYTES * (params + tokens * sides), 2 * tokens * params
    return 1e6 * max(moved / limits[0], done / limits[1])


def table(layers: list[LayerSpec], limits: tuple[float, float]) -> str:
    lines = ["| layer | layers | tokens | b | share | dense, us | BLAST, us | at best x |"]
    lines.append("|---" * 5 + "|---:" * 3 + "|")
    space = SearchSpace(num_blocks=BLOCKS, rank_multiple=16)
    total: dict[tuple[int, int, float], list[float]] = {}
    shapes: dict[tuple[int, int], list[LayerSpec]] = {}
    for layer in layers:
        shapes.setdefault(layer.shape, []).append(layer)
    for (m, n), members in shapes.items():
        for tokens in sorted({call.tokens for call in members[0].calls}):
            dense = floor_us(tokens, m * n, m + n, limits)
            for b in BLOCKS:
                for keep in KEEPS:
                    params = members[0].params(space.uniform_choice(members[0], b, keep))
                    blast = floor_us(tokens, params, m + n, limits)
                    lines.append(
                        f"| {m} x {n} | {len(members)} | {tokens} | {b} | {keep} "
                        f"| {dense:.1f} | {blast:.1f} | {dense / blast:.2f} |"
                    )
                    sums = total.setdefault((tokens, b, keep), [0.0, 0.0, 0.0])
                    sums[0] += dense * len(members)
                    sums[1] += blast * len(members)
                    sums[2] += len(members)
    for (tokens, b, keep), (dense, blast, count) in sorted(total.items()):
        lines.append(
            f"| all | {count:.0f} | {tokens} | {b} | {keep} | {dense:.0f} | {blast:.0f} "
            f"| {dense / blast:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", choices=tuple(SHAPES))
    parser.add_argument("--bytes", type=float, required=True, help="per second")
    parser.add_argument("--flops", type=float, required=True, help="per second")
    parser.add_argument("--workload", help=f"texts: default {WORKLOADS}; see --workload of search")
    values = parser.parse_args()
    task = ShapesTask(values.shapes)
    with torch.device("meta"):
        model = task.model().eval()
        workloads = workloads_of(
            task, values.workload or (WORKLOADS if task.shape.vocab else None)
        )
    layers, _ = inventory(model, workloads, SearchSpace())
    print(table(layers, (values.bytes, values.flops)))


if __name__ == "__main__":
    main()
