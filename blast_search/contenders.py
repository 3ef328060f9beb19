"""Who takes part in `compare`: every kind of plan, as large as the measured budget allows.

Uniform plans of structures that the search does not use (block-diagonal, Monarch) go through the
same closed loop as all others: their layers are timed beside dense twins, plans are solved for on
those cells, built, timed as whole models and corrected until the measured ratio holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from blast_search.closed_loop import Make, meet
from blast_search.decision import FINAL_ROUNDS, FINAL_SECONDS, Decision
from blast_search.engine import AIM, Contender, Engine
from blast_search.errors import InfeasibleBudgetError
from blast_search.latency import CELL_SECONDS, interleave, synchronizer
from blast_search.layers import dense_weight
from blast_search.plan import Choices
from blast_search.space import DENSE, Candidate, LayerSpec
from blast_search.structured import diagonal_choice, empty_layer, monarch_choice

DIAGONAL_BLOCKS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Entry:
    """One contender; `make` gives its kind's plan for another ratio (None: there is none)."""

    contender: Contender
    make: Make | None = None


Extra = Callable[[Engine, float, int], Mapping[str, Entry]]  # target, loss evaluations so far


def line_up(engine: Engine, decision: Decision) -> dict[str, Entry]:
    """All kinds of plans within the decision's target; the fastest of its kind where none is."""
    target = decision.target
    blocks = [b for b in engine.space.num_blocks if b > 1]
    found: dict[str, Entry | None] = {
        "uniform low rank": _uniform(engine, decision, "uniform low rank", [1], target),
        "block-diagonal": _block_diagonal(engine, target),
        "Monarch": _monarch(engine, blocks, target),
        "uniform BLAST": _uniform(engine, decision, "uniform BLAST", blocks, target),
        # As `decide` did it: the same plans, so their timings are on file.
        "exact plan": entry(engine, "exact", engine.exact, engine.fastest(), target),
        "full search": Entry(decision.winner, decision.make),
    }
    return {name: e for name, e in found.items() if e is not None}


def entry(
    engine: Engine, name: str, make: Make, fastest: Choices | None, target: float
) -> Entry | None:
    """The largest plan of a kind within the target, else its fastest plan, over the budget."""
    engine.latency.correction = 1.0
    contender = meet(engine, name, make, target)
    if contender is None and fastest:
        contender, make = meet(engine, name, lambda _: fastest, target), lambda _: fastest
    engine.latency.correction = 1.0
    return None if contender is None else Entry(contender, make)


def _uniform(
    engine: Engine, decision: Decision, name: str, blocks: list[int], target: float
) -> Entry | None:
    make: Make = lambda ratio: engine.best_uniform(ratio, blocks)  # noqa: E731
    known = decision.baselines.get(name.lower().replace(" ", "_"))
    if known:
        return Entry(known, make)
    return entry(engine, name, make, engine.fastest_uniform(blocks), target)


def level(engine: Engine, entries: Mapping[str, Entry], target: float) -> dict[str, Contender]:
    """Time all contenders side by side; those over the target get smaller plans, and again.

    Returns:
        The contenders with their final timing.  One whose kind has no smaller plan stays over the
        target (feasible=False).
    """
    entries = dict(entries)
    aims = dict.fromkeys(entries, AIM)
    timed: dict[str, Contender] = {}
    for last in [False] * (FINAL_ROUNDS - 1) + [True]:
        plans = {name: e.contender.choices for name, e in entries.items()}
        timings = engine.time("side by side", plans, FINAL_SECONDS * max(1.0, len(plans) / 3))
        for (name, e), timing in zip(entries.items(), timings, strict=True):
            ratio = engine.measured_ratio(e.contender.choices, timing)
            timed[name] = replace(
                e.contender, timing=timing, ratio=ratio, feasible=ratio <= target
            )
        over = [] if last else [name for name, c in timed.items() if not c.feasible]
        smaller: dict[str, Entry] = {}
        for name in over:
            aims[name] *= min(0.99, target / timed[name].ratio)
            again = _smaller(engine, name, entries[name], target, aims[name])
            if again:
                smaller[name] = again
        if not smaller:
            break
        entries |= smaller
    return timed


def _smaller(engine: Engine, name: str, e: Entry, target: float, aim: float) -> Entry | None:
    """A smaller plan of the same kind, or None where there is none."""
    if e.make is None:
        return None
    engine.latency.correction = 1.0
    again = meet(engine, name, e.make, target, aim)
    if again is None or again.choices == e.contender.choices:
        return None
    return Entry(again, e.make)


# ---- structures that only `compare` knows -----------------------------------------------------


def _block_diagonal(engine: Engine, target: float) -> Entry | None:
    """b dense diagonal blocks in every layer that b divides, b as small as the budget allows."""
    plans = []
    for b in DIAGONAL_BLOCKS:
        choices = {ly.name: diagonal_choice(*ly.shape, b) or DENSE for ly in engine.layers}
        if any(not c.is_dense for c in choices.values()):
            plans.append(choices)
    if not plans:
        return None
    measure_cells(engine, plans)
    return entry(
        engine, "block-diagonal", lambda ratio: _largest(engine, plans, ratio),
        _fastest(engine, plans), target,
    )  # fmt: skip


def _monarch(engine: Engine, blocks: list[int], target: float) -> Entry | None:
    """One b and one parameter fraction for all layers; b is the one of least true loss."""
    ladders = {b: ladder for b in blocks if (ladder := _monarch_plans(engine, b))}
    if not ladders:
        return None
    for ladder in ladders.values():  # every eighth plan: latencies between are interpolated
        measure_cells(engine, [*ladder[::8], ladder[-1]])
    engine.latency.correction = 1.0
    losses = []
    for b, ladder in ladders.items():
        try:
            choices = _largest(engine, ladder, AIM * target)
        except InfeasibleBudgetError:
            continue
        losses.append((engine.true_loss(f"Monarch b = {b}", choices), b))
    every = [plan for ladder in ladders.values() for plan in ladder]
    ladder = ladders[min(losses)[1]] if losses else every
    return entry(
        engine, "Monarch", lambda ratio: _largest(engine, ladder, ratio),
        _fastest(engine, every), target,
    )  # fmt: skip


def _monarch_plans(engine: Engine, b: int) -> list[Choices]:
    """Distinct uniform Monarch plans, the largest first."""
    top, multiple = round(100 * max(engine.space.keep)), engine.space.rank_multiple
    plans: list[Choices] = []
    for percent in range(top, 0, -1):
        choices = {
            ly.name: monarch_choice(*ly.shape, b, percent / 100, multiple) or DENSE
            for ly in engine.layers
        }
        if any(not c.is_dense for c in choices.values()) and choices not in plans[-1:]:
            plans.append(choices)
    return plans


def _largest(engine: Engine, plans: Iterable[Choices], ratio: float) -> Choices:
    """The first of `plans` (largest first) whose predicted ratio is within `ratio`."""
    for choices in plans:
        predicted = engine.predicted_ratio(choices)
        if predicted is not None and predicted <= ratio:
            return choices
    raise InfeasibleBudgetError(f"no plan of this kind has a layer latency ratio of {ratio:.3f}.")


def _fastest(engine: Engine, plans: Iterable[Choices]) -> Choices | None:
    known = [(r, p) for p in plans if (r := engine.predicted_ratio(p)) is not None]
    return min(known, key=lambda item: item[0])[1] if known else None


def measure_cells(engine: Engine, plans: Iterable[Choices]) -> None:
    """Time the layers of plans beside their dense twins and enter them as latency cells.

    Layers of equal shape and calls share a cell; a cell on file is not timed again.
    """
    layers = {layer.name: layer for layer in engine.layers}
    wanted: dict[tuple[object, ...], list[tuple[str, Candidate]]] = {}
    for choices in plans:
        for name, candidate in choices.items():
            if not candidate.is_dense and candidate not in engine.latency.costs(name):
                layer = layers[name]
                key = (layer.shape, layer.bias, layer.calls, candidate)
                wanted.setdefault(key, []).append((name, candidate))
    with engine.report.stage("profile structures", len(wanted)) as advance:
        for members in wanted.values():
            ratio = _cell_ratio(engine, layers[members[0][0]], members[0][1])
            for name, candidate in members:
                costs = engine.latency.costs(name)
                costs[candidate] = ratio * costs[DENSE]
            advance()


def _cell_ratio(engine: Engine, layer: LayerSpec, candidate: Candidate) -> float:
    """Measured time of a candidate over its dense twin's, over all of a layer's calls."""
    m, n = layer.shape
    calls = ",".join(f"{c.tokens}@{c.weight:g}" for c in layer.calls)
    key = f"{m}x{n} {'bias' if layer.bias else 'plain'} {calls} {candidate.key}"
    measure = lambda: _time_cell(engine, layer, candidate)  # noqa: E731
    return float(engine.run.once("structure cell", key, candidate.key, measure))


def _time_cell(engine: Engine, layer: LayerSpec, candidate: Candidate) -> float:
    linear = engine.fitter.dense[layer.name]
    module, weight = empty_layer(linear, candidate), dense_weight(linear)
    mine = dense = 0.0
    with torch.inference_mode():
        for call in layer.calls:
            x = torch.randn(call.tokens, layer.in_features, dtype=weight.dtype).to(weight.device)
            times = interleave(
                {"dense": lambda x=x: linear(x), "candidate": lambda x=x: module(x)},  # type: ignore[misc]
                synchronizer(weight.device),
                CELL_SECONDS,
            )
            mine += call.weight * float(np.median(times["candidate"]))
            dense += call.weight * float(np.median(times["dense"]))
    return mine / dense
