"""A model made of numbers: known true losses that the scores misjudge, for tests of the search.

Hidden factors by layer type, by depth and by layer, and an interaction: the loss grows faster than
the sum.  It stands where the search needs an Engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from blast_search import solver
from blast_search.deadline import FOREVER, Deadline
from blast_search.engine import AIM
from blast_search.hull import grouped
from blast_search.judge import HOPELESS
from blast_search.latency_model import LatencyModel
from blast_search.plan import Choices
from blast_search.runfolder import digest
from blast_search.space import DENSE, Call, Candidate, LayerSpec
from blast_search.tables import LatencyTable, Option, Score
from blast_search.tangent import Change, Tangent, near

TYPES = ("q", "k", "v", "o", "up", "down")


class Silent:
    def stage(self, _name: str, _total: int) -> Any:
        return nullcontext(lambda: None)

    def say(self, _text: str) -> None: ...


class Landscape:
    def __init__(self, seed: int, blocks: int = 6, hidden: float = 1.0, single: float = 0.3):
        rng = np.random.default_rng(seed)
        self.layers = [
            LayerSpec(f"h.{i}.{kind}", 64, 64, True, (Call(16),))
            for i in range(blocks) for kind in TYPES
        ]  # fmt: skip
        self.table: dict[str, list[Option]] = {}
        by_type = dict(zip(TYPES, 2.0 ** rng.normal(0, hidden, len(TYPES)), strict=True))
        by_depth = 2.0 ** rng.normal(0, hidden, blocks)
        self.hidden = {}
        for index, layer in enumerate(self.layers):
            keep = np.linspace(0.08, 0.8, 9)
            scale = 0.02 * np.exp(rng.normal(0, 0.7))
            self.table[layer.name] = [Option(DENSE, 100.0, 0.0)] + [
                Option(Candidate(1, 8 * (k + 1)), 100 * x, float(scale * (1 - x) ** 2))
                for k, x in enumerate(keep)
            ]
            factor = by_type[layer.type_name.rpartition(".")[2]] * by_depth[index // len(TYPES)]
            self.hidden[layer.name] = factor * 2.0 ** rng.normal(0, single)
        self.by_key = {(n, o.candidate): o for n, items in self.table.items() for o in items}
        self.dense_cost = 100.0 * len(self.layers)
        self.aim = AIM
        self.order = [0, 1, 2, 3]
        self.batch_factors = 1 + 0.1 * rng.normal(0, 1, 4)
        self.report, self.scorer = Silent(), self
        self.latency = LatencyModel((), LatencyTable("some"))
        self.additivity: dict[str, Any] = {}
        self.tuning: dict[str, Any] = {}
        self.asked: list[str] = []  # what was built, and batches seen
        self.batches_seen = 0

    def options(self) -> dict[str, list[Option]]:
        return self.table

    def score(self, layer: LayerSpec, candidate: Candidate) -> Score:
        return Score(0.0, self.by_key[layer.name, candidate].loss)

    def exact(self, ratio: float, weights: Any = None, gap: float = solver.GAP) -> Choices:
        return self.solve(self.table, ratio, weights, gap).choices

    def solve(
        self, options: Any, ratio: float, weights: Any = None, gap: float = solver.GAP
    ) -> Any:
        return solver.solve(options, ratio * self.dense_cost, weights, gap=gap)

    def predicted_loss(self, choices: Choices) -> float:
        return sum(self.by_key[n, c].loss for n, c in choices.items())

    def tangent(self, plan: Choices, loss: float, _deadline: Deadline = FOREVER) -> Tangent:
        total = sum(self.hidden[n] * self.by_key[n, c].loss for n, c in plan.items())
        changes = {}
        for group in grouped(self.table):
            (name,) = group.names
            here = self.by_key[name, plan[name]].loss
            offered = near(group, here)
            slope = self.hidden[name] * (1 + total)  # the derivative of total + total^2 / 2
            changes[name] = [
                Change(o.candidate, slope * (o.loss - here), abs(o.loss - here))
                for o in self.table[name]
                if o.candidate in offered
            ]
        return Tangent(self, changes, loss / self.predicted_loss(plan))  # type: ignore[arg-type]

    def predicted_ratio(self, choices: Choices) -> float:
        return sum(self.by_key[n, c].cost_us for n, c in choices.items()) / self.dense_cost

    def judged(
        self,
        _name: str,
        plans: Sequence[Choices],
        count: int | None = None,
        bar: Sequence[float] = (),
        deadline: Deadline = FOREVER,
        advance: Callable[[], None] = lambda: None,
    ) -> list[list[float] | None]:
        answers: list[list[float] | None] = []
        for choices in plans:
            advance()
            answers.append(None if deadline.expired() else self._losses(choices, count, bar))
        return answers

    def _losses(
        self, choices: Choices, count: int | None = None, bar: Sequence[float] = ()
    ) -> list[float]:
        total = sum(self.hidden[n] * self.by_key[n, c].loss for n, c in choices.items())
        found: list[float] = []
        self.asked.append(digest(choices))
        for factor in self.batch_factors[:count]:
            found.append(float(factor * (total + 0.5 * total**2)))
            self.batches_seen += 1
            if bar and len(found) < 4 and np.mean(found) > HOPELESS * np.mean(bar[: len(found)]):
                break
        return found

    def loss(self, choices: Choices) -> float:
        return float(np.mean(self._losses(choices)))

    def note_point(self, *_: Any) -> None: ...
