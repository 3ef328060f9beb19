"""What every candidate costs in quality, predicted from few measurements.

Three facts make a score:
1. b = 1's error at every rank comes in closed form from the layer's whitened SVD;
2. b > 1's gain over it is measured on one layer of each type, at two ranks per block count;
3. one whole-model probe per layer turns error into loss: loss ~ error^2 (errors alone are no
   score: on a sentence encoder they allocate no better than a uniform plan).

Probes and fits are measurements, appended to probes.csv as they finish and never repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np

from blast_search.batches import Batch, spread
from blast_search.deadline import FOREVER, Deadline
from blast_search.errors import IncompatibleInputError
from blast_search.files import append_row, finite, read_rows
from blast_search.fitting import Fitter
from blast_search.judge import Question
from blast_search.panel import Panel
from blast_search.progress import Reporter
from blast_search.space import Candidate, LayerSpec, SearchSpace
from blast_search.tables import LatencyTable, Score, ScoreTable

PROBE_KEEP = 0.25  # parameters that a probe keeps: near what mid-size budgets choose
GAIN_KEEPS = (0.2, 0.45)
BEST_GAIN = 0.75  # no b > 1 was seen to lower low rank's error by more than a quarter
PROBE_CALLS = 320  # whole-model calls that all probes together may take

EXACT = 1e-3  # a probe's relative error below which its loss is rounding

DEPTHS = 3  # per layer type, so many layers are probed whatever the time

FIELDS = ("kind", "layer", "candidate", "error", "loss")
Gains = dict[tuple[str, tuple[int, int], int], list[tuple[int, float]]]


@dataclass
class ProbeTable:
    """Measured (kind, layer, candidate) -> (relative error, true loss of the whole model)."""

    path: Path | None = None
    values: dict[tuple[str, str, Candidate], tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> ProbeTable:
        table = cls(path)
        for row in read_rows(path, FIELDS):
            try:
                key = (row["kind"], row["layer"], Candidate.from_key(row["candidate"]))
                table.values[key] = finite(row["error"]), finite(row["loss"])
            except ValueError as error:
                raise IncompatibleInputError(f"{path}: {error}. Remove the line.") from error
        return table

    def add(self, kind: str, layer: str, candidate: Candidate, error: float, loss: float) -> None:
        if self.path:
            row = (kind, layer, candidate.key, f"{error:.9g}", f"{loss:.9g}")
            append_row(self.path, FIELDS, dict(zip(FIELDS, row, strict=True)))
        # What is used is what is on file, so that a resumed run computes the same scores.
        self.values[kind, layer, candidate] = float(f"{error:.9g}"), float(f"{loss:.9g}")


def probe_batches(batches: Sequence[Batch], num_layers: int) -> int:
    """How many calibration batches a probe uses: all, or fewer where there are many layers."""
    return max(1, min(len(batches), PROBE_CALLS // max(1, num_layers)))


def estimate_scores(
    layers: Sequence[LayerSpec],
    space: SearchSpace,
    latency: LatencyTable,
    panel: Panel,
    probes: ProbeTable,
    report: Reporter,
    deadline: Deadline = FOREVER,
) -> Scorer:
    """Measure what scores need, and return their predictor.

    Args:
        deadline: once it has passed, only one layer of each type and third of the depth is probed;
            the others take what lies between the probed ones of their type.
    """
    fitter = panel.judge.fitter
    alive = _shared(
        layers, {layer.name: promising(layer, space, latency, fitter) for layer in layers}
    )
    wanted = gain_fits(layers, space, alive)
    with report.stage("fit sample layers", len(wanted)) as advance:
        for layer, candidate in wanted:
            if ("fit", layer.name, candidate) not in probes.values:
                error = fitter.error(layer.name, candidate)
                probes.add("fit", layer.name, candidate, error, 0.0)
            advance()
    targets = {
        layer: probe
        for layer in layers
        if alive[layer.name] and (probe := probe_candidate(layer, space))
    }
    with report.stage("probe layers", len(targets)) as advance:
        _probe(targets, fitter, panel, probes, deadline, advance)
    scales = measured_scales(targets, probes)
    silent = [name for name, scale in scales.items() if scale == 0.0]
    probed = sum(("probe", ly.name, probe) in probes.values for ly, probe in targets.items())
    if silent:
        report.say(
            f"{', '.join(silent[:4])}{' and others' if len(silent) > 4 else ''}: what replaces "
            "them changes nothing in the outputs that are judged, and counts as free. Exclude "
            "them, or wrap the model so that it returns what they are for."
        )
    if probed < len(targets):
        report.say(
            f"probed {probed} of {len(targets)} layers in the time there was; the others "
            "take what lies between the probed ones of their type."
        )
    return Scorer(
        fitter, between(list(targets), scales), measured_gains(layers, probes, fitter), alive,
        probed,
    )  # fmt: skip


def _probe(
    targets: Mapping[LayerSpec, Candidate],
    fitter: Fitter,
    panel: Panel,
    probes: ProbeTable,
    deadline: Deadline,
    advance: Callable[[], None],
) -> None:
    """The model's loss with one layer at a time replaced; the first ones whatever the time."""
    first = spread_over_depth(list(targets))
    count = probe_batches(panel.judge.batches, len(panel.judge.layers))
    order = tuple(spread(len(panel.judge.batches))[:count])  # they may be sorted

    def ask(layers: Sequence[LayerSpec], deadline: Deadline) -> None:
        new = [ly for ly in layers if ("probe", ly.name, targets[ly]) not in probes.values]
        for _ in range(len(layers) - len(new)):
            advance()

        def record(index: int, losses: list[float]) -> None:
            layer = new[index]
            name, probe, loss = layer.name, targets[layer], fmean(losses)
            probes.add("probe", name, probe, fitter.basis(name).error(probe.rank), loss)
            advance()

        questions = [Question({ly.name: targets[ly]}, order) for ly in new]
        panel.ask(questions, record, deadline)

    with panel.session(len(targets)):
        ask(first, FOREVER)
        ask([layer for layer in targets if layer not in first], deadline)


def spread_over_depth(layers: Sequence[LayerSpec]) -> list[LayerSpec]:
    """Of every type and shape, the middle layers of DEPTHS parts of the depth."""
    chosen: dict[LayerSpec, None] = {}
    for members in by_type(layers).values():
        for part in range(DEPTHS):
            chosen[members[(2 * part + 1) * len(members) // (2 * DEPTHS)]] = None
    return list(chosen)


def by_type(layers: Sequence[LayerSpec]) -> dict[tuple[str, tuple[int, int]], list[LayerSpec]]:
    """Layers of one type and shape, in the model's order."""
    types: dict[tuple[str, tuple[int, int]], list[LayerSpec]] = {}
    for layer in layers:
        types.setdefault((layer.type_name, layer.shape), []).append(layer)
    return types


def measured_scales(
    targets: Mapping[LayerSpec, Candidate], probes: ProbeTable
) -> dict[str, float]:
    """Loss per squared relative error of the probed layers, as far as it can be told.

    It cannot of a layer that is of low rank as it is: rounding over an error of nearly nothing.
    Nor where the loss is exactly 0 while others of the type have one: the probe's batches did not
    reach the layer, as happens to experts that few tokens are routed to.
    """
    scales = {}
    for layer, probe in targets.items():
        error, loss = probes.values.get(("probe", layer.name, probe), (0.0, 0.0))
        if error >= EXACT:
            scales[layer.name] = max(loss, 0.0) / error**2
    for members in by_type(list(targets)).values():
        known = [layer.name for layer in members if layer.name in scales]
        if any(scales[name] for name in known):
            for name in known:
                if not scales[name]:
                    del scales[name]
    return scales


def between(layers: Sequence[LayerSpec], scales: Mapping[str, float]) -> dict[str, float]:
    """Scales of all layers: linear over the depth between the probed ones of the same type.

    Types without any take the mean of all, and 1 where there is none at all.
    """
    found = {}
    mean = fmean(scales.values()) if scales else 1.0
    for members in by_type(layers).values():
        known = [k for k, layer in enumerate(members) if layer.name in scales]
        values = [scales[members[k].name] for k in known]
        for k, layer in enumerate(members):
            found[layer.name] = float(np.interp(k, known, values)) if known else mean
    return found


@dataclass(frozen=True)
class Scorer:
    """Predicts the score of any candidate of any layer, also at ranks off the grid."""

    fitter: Fitter
    scales: Mapping[str, float]  # layer -> loss per squared relative error
    gains: Gains
    alive: Mapping[str, Sequence[Candidate]]
    probed: int  # how many layers were probed; the scales of others are interpolated

    def score(self, layer: LayerSpec, candidate: Candidate) -> Score:
        """The predicted error of a candidate and the loss it adds to the model's."""
        if candidate.is_dense:
            return Score(0.0, 0.0)
        error = self.fitter.basis(layer.name).error(candidate.rank)
        error *= _gain(self.gains, layer, candidate)
        return Score(error, self.scales.get(layer.name, 0.0) * error * error)

    def table(self, layers: Sequence[LayerSpec]) -> ScoreTable:
        return ScoreTable(
            {ly.name: {c: self.score(ly, c) for c in self.alive[ly.name]} for ly in layers}
        )


def probe_candidate(layer: LayerSpec, space: SearchSpace) -> Candidate | None:
    """The low-rank candidate nearest to PROBE_KEEP, if the layer has any."""
    m, n = layer.shape
    low_rank = [c for c in space.candidates(layer) if c.num_blocks == 1]
    return min(low_rank, key=lambda c: abs(layer.params(c) / (m * n) - PROBE_KEEP), default=None)


def promising(
    layer: LayerSpec, space: SearchSpace, latency: LatencyTable, fitter: Fitter
) -> list[Candidate]:
    """Candidates faster than dense that low rank does not beat outright.

    A b > 1 candidate is dropped, before it is ever factorised, if some low-rank candidate is as
    fast and has a smaller error even against the best gain ever seen.  Uniform plans need every
    candidate, so a uniform space drops none.
    """
    costs = latency.costs(layer)
    dense = [cost for candidate, cost in costs.items() if candidate.is_dense]
    fast = {
        c: costs[c]
        for c in space.candidates(layer)
        if not c.is_dense and c in costs and dense and costs[c] < dense[0]
    }
    if space.uniform:
        return list(fast)
    basis = fitter.basis(layer.name) if fast else None
    low_rank = [(cost, c.rank) for c, cost in fast.items() if c.num_blocks == 1]
    kept = []
    for c, cost in fast.items():
        assert basis is not None
        bound = BEST_GAIN * basis.error(c.rank)
        beaten = c.num_blocks > 1 and any(
            other <= cost and basis.error(rank) <= bound for other, rank in low_rank
        )
        if not beaten:
            kept.append(c)
    return kept


def _shared(
    layers: Sequence[LayerSpec], alive: Mapping[str, list[Candidate]]
) -> dict[str, list[Candidate]]:
    """Tied layers keep what any of them keeps: they can only take what all of them may take."""
    union: dict[str, dict[Candidate, None]] = {}
    for layer in layers:
        union.setdefault(layer.tie or layer.name, {}).update(dict.fromkeys(alive[layer.name]))
    return {layer.name: list(union[layer.tie or layer.name]) for layer in layers}


def gain_fits(
    layers: Sequence[LayerSpec], space: SearchSpace, alive: Mapping[str, Sequence[Candidate]]
) -> list[tuple[LayerSpec, Candidate]]:
    """One layer per type (the middle one), two ranks per block count that is still alive."""
    fits = []
    for members in by_type(layers).values():
        layer = members[len(members) // 2]
        blocks = {c.num_blocks for member in members for c in alive[member.name]} - {1}
        for b in sorted(blocks):
            candidates = {space.uniform_choice(layer, b, keep) for keep in GAIN_KEEPS}
            fits += [(layer, c) for c in sorted(candidates) if not c.is_dense]
    return fits


def measured_gains(layers: Sequence[LayerSpec], probes: ProbeTable, fitter: Fitter) -> Gains:
    """(type, shape, b) -> [(rank, error relative to low rank of that rank)], by rank."""
    by_name = {layer.name: layer for layer in layers}
    gains: Gains = {}
    for (kind, name, candidate), (error, _) in probes.values.items():
        if kind == "fit" and name in by_name:
            layer = by_name[name]
            base = fitter.basis(name).error(candidate.rank)
            key = (layer.type_name, layer.shape, candidate.num_blocks)
            gains.setdefault(key, []).append((candidate.rank, error / base if base > 0 else 1.0))
    return {key: sorted(points) for key, points in gains.items()}


def _gain(gains: Gains, layer: LayerSpec, candidate: Candidate) -> float:
    """Linear in the rank between the measured points, flat outside them."""
    points = gains.get((layer.type_name, layer.shape, candidate.num_blocks))
    if not points:
        return 1.0
    (low, first), (high, last) = points[0], points[-1]
    share = (candidate.rank - low) / (high - low) if high > low else 0.0
    return first + (last - first) * min(1.0, max(0.0, share))
