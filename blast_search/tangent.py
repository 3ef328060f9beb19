"""How the true loss changes around a plan: first order from a gradient, the rest from the scores.

Scores are measured on the dense model with one layer replaced at a time.  In a plan all layers are
replaced, and their errors add up, cancel and saturate.  One backward pass of the plan's model
over the calibration data gives G = dL / dW of every layer's effective weight; a layer's change
from W to W' then costs about

    <G, W' - W>  +  trust * scale * |W' - W|^2

where |.| is relative to the dense weight, in the Gram's norm, scale the probe's loss per squared
error (sensitivity.py), and `trust` says how much of that curvature is left at the plan.

W' of b > 1 has to be fitted.  The low-rank matrix of equal error in its place (all ranks at once
from the layer's SVD) was tried: on `minilm` at 0.3, steps that way took 2.1 % off the exact plan's
true loss, with fits 4.1 % (one run each).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from blast_search import solver
from blast_search.deadline import FOREVER, Deadline
from blast_search.hull import Group, grouped
from blast_search.layers import dense_weight
from blast_search.matrix import BlastLinear
from blast_search.plan import Choices
from blast_search.space import Candidate, ties_of

if TYPE_CHECKING:
    from blast_search.engine import Engine

SPAN = 3  # so many undominated options dearer than the plan's, and as many cheaper, are offered


@dataclass(frozen=True)
class Change:
    """Another candidate of one layer: the loss's change to first order, and the rest."""

    candidate: Candidate
    slope: float
    bend: float


@dataclass(frozen=True)
class Tangent:
    """The changes of all layers at one plan.

    Attributes:
        trust: the plan's true loss over the sum of its scores: roughly the curvature that is left.
    """

    engine: Engine
    changes: Mapping[str, list[Change]]
    trust: float

    @classmethod
    def at(
        cls, engine: Engine, plan: Choices, loss: float, deadline: Deadline = FOREVER
    ) -> Tangent:
        """Differentiate at a plan of known true loss.

        Args:
            deadline: once it has passed, nothing is fitted any more: b > 1 is not offered.

        Raises:
            RuntimeError: the model's output cannot be differentiated.
        """
        gradients = engine.panel.judge.gradients(plan, engine.order)
        changes, options, late = {}, engine.options(), deadline.expired
        by_name = {layer.name: layer for layer in engine.layers}
        for group in grouped(options, ties=ties_of(engine.layers)):
            here = sum(engine.scorer.score(by_name[n], plan[n]).loss for n in group.names)
            offered = near(group, here)
            if late():
                fitted = {plan[group.names[0]]}
                offered = [c for c in offered if c.num_blocks <= 1 or c in fitted] or offered[:1]
            for name in group.names:
                found = [o.candidate for o in options[name] if o.candidate in offered]
                changes[name] = list(_changes(engine, name, plan[name], found, gradients))
        total = engine.predicted_loss(plan)
        return cls(engine, changes, loss / total if total > 0 and loss > 0 else 1.0)

    def solve(self, ratio: float, share: float, gap: float = solver.GAP) -> Choices:
        """The plan of least changed loss within a predicted ratio.

        Args:
            share: of `trust`; the less, the further the plan may go from this one.

        Raises:
            InfeasibleBudgetError: no plan has that ratio.
        """
        options, now = {}, self.engine.options()
        for name, changes in self.changes.items():
            losses = {c.candidate: c.slope + share * self.trust * c.bend for c in changes}
            least = min(losses.values())  # the solver's losses start at zero
            options[name] = [  # what an option costs may have been corrected since
                replace(o, loss=losses[o.candidate] - least)
                for o in now[name]
                if o.candidate in losses
            ]
        return self.engine.solve(options, ratio, gap=gap).choices


def near(group: Group, loss: float) -> list[Candidate]:
    """The undominated options around the one of this predicted loss: SPAN either way."""
    k = int((group.loss > loss * (1 + 1e-12)).sum())  # options come with falling loss
    return list(group.candidates[max(0, k - SPAN) : k + SPAN + 1])


def _changes(
    engine: Engine,
    name: str,
    candidate: Candidate,
    others: list[Candidate],
    gradients: Mapping[str, Tensor],
) -> Iterator[Change]:
    """One layer's changes from `candidate` to each of `others`."""
    linear, gram = engine.fitter.dense[name], engine.fitter.gram(name)
    dense = dense_weight(linear).detach().float()
    gram = None if gram is None else gram.to(dense)

    def squared(matrix: Tensor) -> float:
        return float(((matrix if gram is None else matrix @ gram) * matrix).sum())

    def matrix(c: Candidate) -> Tensor:
        module = engine.fitter.module(name, c)
        return module.to_dense().detach().float() if isinstance(module, BlastLinear) else dense

    here, scale = matrix(candidate), engine.scorer.scales.get(name, 0.0) / (squared(dense) or 1.0)
    gradient = gradients[name].to(dense) if name in gradients else None  # no path to the output
    for other in others:
        change = matrix(other) - here
        slope = 0.0 if gradient is None else float((gradient * change).sum())
        yield Change(other, slope, scale * squared(change))
