"""A model of real size on a GPU: dense against uniform BLAST against the plan of a search.

    python benchmarks/gpu_model.py latency               # one NVIDIA GPU with 60 GB, minutes
    python benchmarks/gpu_model.py factorize             # all matrices at b = 16, half the size
    python benchmarks/gpu_model.py latency --shapes tiny # dry check on a CPU, no real result

Needs this package with torch, triton and the scientific stack; Ray and Optuna are not used.
`latency`: cells are measured as CUDA graphs (as by `profile --mode cuda-graph-cold`), errors
of one layer per type give every candidate a score (relative squared error of the weight, summed
over layers: the weights are nobody's, see tasks/shapes.py), and for each workload the fastest
plan whose score is that of uniform b = 16 at half the parameters is solved for.  Then whole
models are timed side by side, and 20 random plans: predicted against measured.
`factorize` times the factorisation of every matrix and compares some errors with PrecGD-300.
Writes model-<shapes>.json or factorize-<shapes>.json to --out (default results/gpu/<device>).
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blast_search import solver
from blast_search.factorize import factorize, factorize_many
from blast_search.files import write_json
from blast_search.fitting import Fitter
from blast_search.latency import describe
from blast_search.latency_model import LatencyModel
from blast_search.layers import Workload, dense_weight, inventory
from blast_search.model_latency import Timing, time_variants, untrained
from blast_search.plan import Choices
from blast_search.plan_check import check_text, correction, cross_validated, measure_plans
from blast_search.prepared import Prepared
from blast_search.profiling import Profiler
from blast_search.progress import Reporter
from blast_search.runfolder import RunFolder
from blast_search.sensitivity import ProbeTable, Scorer, by_type, gain_fits, measured_gains
from blast_search.space import DENSE, LayerSpec, SearchSpace
from blast_search.tables import LatencyTable, Score, ScoreTable, corrected, layer_options
from blast_search.tasks.shapes import SHAPES, ShapesTask

ROOT = Path(__file__).resolve().parent.parent
BLOCKS, KEEP = 16, 0.5  # the uniform plan of the published Llama-7B result
TINY = {"width": 128, "depth": 3, "heads": 4, "hidden": 256, "vocab": 64, "tokens": 64}
KEEPS = (0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
CHECK_PLANS = 20
CONTEXT = 512  # tokens in the cache when one more is decoded
SECONDS = 5.0  # per workload, for all variants


def prepared(shapes: str, report: Reporter) -> Prepared:
    """The model, built on the device in its dtype; three workloads."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if shapes == "tiny":
        SHAPES["tiny"] = replace(SHAPES["llama-7b"], **TINY)
    task = ShapesTask(shapes)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    short = ShapesTask(shapes)
    short.shape = replace(task.shape, tokens=min(CONTEXT, task.shape.tokens))
    with device:
        model = task.model().eval()
        batches = {
            "decode 1": short.make_workload(1, 1),
            "decode 16": short.make_workload(16, 1),
            "prefill": task.make_workload(1, task.shape.tokens),
        }
        workloads = [Workload(name, batch, 1.0) for name, batch in batches.items()]
    torch.set_default_dtype(torch.float32)
    space = SearchSpace(
        num_blocks=(1, 2, 4, 8, BLOCKS),
        keep=KEEPS,
        rank_multiple=16 if device.type == "cuda" else 8,
    )
    layers, skipped = inventory(model, workloads, space)
    # Cells with a flushed cache: in the model, every layer finds its weights in memory.
    mode = "cuda-graph-cold" if device.type == "cuda" else "eager"
    environment = describe(device.type, str(dtype).removeprefix("torch."))
    report.say(f"{shapes}: {len(layers)} layers on {environment['device']}")
    return Prepared(
        task, model, layers, skipped, space, workloads, device, dtype, mode, environment
    )


def scores(p: Prepared, report: Reporter) -> ScoreTable:
    """Relative squared errors: measured on one layer per type, shared by the others."""
    sampled = {
        layer.name: members[len(members) // 2]
        for members in by_type(p.layers).values()
        for layer in members
    }
    chosen = [layer for layer in p.layers if sampled[layer.name] is layer]
    ranks = {ly.name: max(c.rank for c in p.space.candidates(ly)) for ly in chosen}
    fitter = Fitter(p.model, chosen, {}, ranks)
    alive = {ly.name: [c for c in p.space.candidates(ly) if not c.is_dense] for ly in chosen}
    wanted, probes = gain_fits(chosen, p.space, alive), ProbeTable()
    with report.stage("fit sample layers", len(wanted)) as advance:
        for layer, candidate in wanted:
            error = fitter.error(layer.name, candidate)
            probes.add("fit", layer.name, candidate, error, 0.0)
            advance()
    gains = measured_gains(chosen, probes, fitter)
    ones = dict.fromkeys(alive, 1.0)
    scorer = Scorer(fitter, ones, gains, alive, len(chosen))
    known = {ly.name: {c: scorer.score(ly, c) for c in alive[ly.name]} for ly in chosen}
    return ScoreTable({ly.name: known[sampled[ly.name].name] for ly in p.layers})


def loss(table: ScoreTable, choices: Choices) -> float:
    return sum(table.scores[name].get(c, Score(0.0, 0.0)).loss for name, c in choices.items())


def fastest(latency: LatencyModel, table: ScoreTable, limit: float) -> Choices:
    """The fastest plan on the hull whose score is at most `limit`."""
    options = layer_options(latency.layers, latency.costs, table)
    front = solver.front(corrected(options, latency.factor))
    return front.choices(int(np.argmax(front.loss <= limit * (1 + 1e-9))))


def latencies(
    p: Prepared, report: Reporter, keep: Callable[[Any], None], cells: Path
) -> dict[str, Any]:
    """Dense, uniform and searched plans by workload, and predictions against measurements.

    Args:
        keep: called with what was found after each workload: a run may be cut off.
        cells: where measured cells go meanwhile.
    """
    table = LatencyTable.open(cells, p.fingerprint)
    Profiler(p, table, "local", None, report).run("full")
    found: dict[str, Any] = {"cells": len(table.cells), "workloads": {}}
    quality = scores(p, report)
    uniform: Choices = {ly.name: p.space.uniform_choice(ly, BLOCKS, KEEP) for ly in p.layers}
    low_rank: Choices = {ly.name: p.space.uniform_choice(ly, 1, KEEP) for ly in p.layers}
    four: Choices = {ly.name: p.space.uniform_choice(ly, 4, KEEP) for ly in p.layers}
    limit = loss(quality, uniform)
    names = [w.name for w in p.workloads]
    parts = LatencyModel(p.layers, table, workloads=names).parts
    for workload, latency in zip(p.workloads, parts, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            checked = measure_plans(
                p.model,
                latency,
                [workload],
                RunFolder(Path(folder)),
                report,
                0,
                CHECK_PLANS,
                p.mode,
            )
        latency.factors = correction(checked)
        errors = cross_validated(checked)
        report.say(f"{workload.name}: {check_text(errors)}")
        plans = {
            "uniform b = 16": uniform,
            "uniform b = 4": four,
            "uniform low rank": low_rank,
            "searched": fastest(latency, quality, limit),
        }
        timings = time_variants(
            p.model, p.layers,
            {name: untrained(p.model, p.layers, plan) for name, plan in plans.items()},
            [workload], SECONDS, mode=p.mode,
        )  # fmt: skip
        rows = {
            name: row(timings[name], latency.ratio(plan), loss(quality, plan), plan)
            | {"parameter_ratio": kept(p.layers, plan)}
            for name, plan in plans.items()
        }
        found["workloads"][workload.name] = {"latency_check": errors, "plans": rows}
        for name, values in rows.items():
            report.say(
                f"  {name}: {values['speedup']:.2f} times as fast as dense "
                f"({values['dense_ms']:.2f} ms), score {values['score']:.3f}"
            )
        keep(found)
    return found


def kept(layers: Sequence[LayerSpec], plan: Choices) -> float:
    """The share of the searched layers' parameters that a plan keeps."""
    return sum(ly.params(plan[ly.name]) for ly in layers) / sum(ly.params(DENSE) for ly in layers)


def row(timing: Timing, predicted: float | None, score: float, plan: Choices) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for candidate in plan.values():
        key = f"b{candidate.num_blocks}" if candidate.num_blocks else "dense"
        counts[key] = counts.get(key, 0) + 1
    low, high = timing.ratio_model_ci95
    return {
        "speedup": 1 / timing.ratio_model, "speedup_ci95": [1 / high, 1 / low],
        "dense_ms": timing.dense_ms, "fixed_ms": timing.fixed_ms, "ms": timing.median_ms,
        "measured_ratio_layers": timing.ratio_layers, "predicted_ratio_layers": predicted,
        "score": score, "layers_by_blocks": counts,
    }  # fmt: skip


def factorizations(
    p: Prepared, report: Reporter, seconds: float, keep: Callable[[Any], None]
) -> dict[str, Any]:
    """Time to factorise all layers at b = 16, half the parameters; PrecGD-300 on one per shape.

    Args:
        seconds: no block of layers, and no PrecGD, is begun after these.
        keep: called with what was found so far: a run may be cut off.
    """
    errors, done, spent = [], 0, 0.0
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {"of": len(p.layers), "errors": errors, "precgd": rows}
    began = time.monotonic()
    groups = list(by_type(p.layers).values())
    by_depth = [list(members) for members in zip(*groups, strict=True)]  # block by block
    with report.stage("factorise", len(p.layers)) as advance:
        for block in by_depth:
            shapes: dict[tuple[int, int], list[LayerSpec]] = {}
            for layer in block:
                shapes.setdefault(layer.shape, []).append(layer)
            for members in shapes.values():
                weights = [dense_weight(p.model.get_submodule(ly.name)).float() for ly in members]
                choice = p.space.uniform_choice(members[0], BLOCKS, KEEP)
                fitted = factorize_many(weights, choice.num_blocks, choice.rank)
                errors += [
                    {"layer": ly.name, "error": f.error}
                    for ly, f in zip(members, fitted, strict=True)
                ]
                done += len(members)
                for _ in members:
                    advance()
            if p.device.type == "cuda":
                torch.cuda.synchronize()
            spent = time.monotonic() - began
            found |= {
                "matrices": done, "seconds": round(spent, 1),
                "seconds_for_all": round(spent / done * len(p.layers), 1),
            }  # fmt: skip
            keep(found)
            if spent > seconds:
                break
    report.say(f"{done} of {len(p.layers)} matrices in {spent:.0f} s")
    firsts: dict[tuple[int, int], LayerSpec] = {}
    for layer in by_depth[0]:
        firsts.setdefault(layer.shape, layer)
    start = time.monotonic()
    for layer in firsts.values():
        if time.monotonic() - start > seconds:
            break
        choice = p.space.uniform_choice(layer, BLOCKS, KEEP)
        weight = dense_weight(p.model.get_submodule(layer.name)).float()
        ours = next(e["error"] for e in errors if e["layer"] == layer.name)
        began = time.monotonic()
        theirs = factorize(weight, choice.num_blocks, choice.rank, method="precgd").error
        rows.append({
            "layer": layer.name, "rank": choice.rank, "als": ours, "precgd_300": theirs,
            "precgd_seconds": round(time.monotonic() - began, 1),
        })  # fmt: skip
        report.say(f"  {layer.name}: ALS {ours:.4f}, PrecGD-300 {theirs:.4f}")
        keep(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("latency", "factorize"))
    parser.add_argument("--shapes", default="llama-7b", choices=("llama-7b", "llama-3-8b", "tiny"))
    parser.add_argument("--seconds", type=float, default=480, help="factorize: for each method")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    values = parser.parse_args()
    if values.shapes != "tiny" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --shapes tiny is the dry check on a CPU.")
    report, began = Reporter(), time.monotonic()
    p = prepared(values.shapes, report)
    slug = re.sub(r"[^a-z0-9]+", "-", p.environment["device"].lower()).strip("-")
    out = values.out or ROOT / "results" / "gpu" / slug
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{'model' if values.part == 'latency' else 'factorize'}-{values.shapes}.json"

    def keep(result: dict[str, Any]) -> None:
        peak = torch.cuda.max_memory_allocated() / 2**30 if p.device.type == "cuda" else None
        facts = {
            "shapes": values.shapes, "context": CONTEXT, "mode": p.mode,
            "environment": p.environment,
            "peak_memory_gib": peak, "seconds_in_all": round(time.monotonic() - began, 1),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        write_json(file, result | facts)

    with torch.no_grad():
        if values.part == "latency":
            keep(latencies(p, report, keep, out / f"cells-{values.shapes}.csv"))
        else:
            keep(factorizations(p, report, values.seconds, keep))
    report.say(f"wrote {file}")


if __name__ == "__main__":
    main()
