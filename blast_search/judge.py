"""How far a plan's model is from the dense one: its layers are fitted, put in place, and called.

A `Judge` holds all that this takes.  It is sent to Ray workers as it is (panel.py), which keep the
model between plans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import nn

from blast_search.batches import Batch, divergences, reference_outputs
from blast_search.fitting import Fitter
from blast_search.layers import swapped
from blast_search.plan import Choices
from blast_search.space import LayerSpec

BROKEN = 1e9  # the loss of a plan whose outputs are not finite
HOPELESS = 1.5  # times the losses to beat, on the same batches


@dataclass(frozen=True)
class Question:
    """What is asked about a plan.

    Attributes:
        choices: candidates by layer; layers that are left out stay as they are.
        order: indices of calibration batches.
        bar: losses to beat, batch by batch of `order`; a plan that is far above them is given up.
    """

    choices: Choices
    order: tuple[int, ...]
    bar: tuple[float, ...] = ()


@dataclass
class Judge:
    """The dense model, what fits its layers, and the data to judge by.

    Attributes:
        references: the dense model's outputs by batch; None: not computed yet.
    """

    model: nn.Module
    layers: Sequence[LayerSpec]
    fitter: Fitter
    batches: Sequence[Batch]
    references: Sequence[Any] | None = None

    def losses(self, question: Question) -> list[float]:
        """Divergence of the plan's model from the dense one, batch by batch.

        Returns:
            One number per batch of `question.order`; fewer where the plan was given up.
        """
        if self.references is None:
            self.references = reference_outputs(self.model, list(self.batches))
        choices, order, bar = question.choices, question.order, question.bar
        layers = [layer for layer in self.layers if layer.name in choices]
        batches = [self.batches[k] for k in order]
        references = [self.references[k] for k in order]
        found: list[float] = []
        with swapped(self.model, layers, self.fitter.modules(choices)):
            for loss in divergences(self.model, batches, references):
                found.append(loss if math.isfinite(loss) else BROKEN)
                seen = len(found)
                if bar and seen < len(order) and fmean(found) > HOPELESS * fmean(bar[:seen]):
                    break
        return found

    def __getstate__(self) -> dict[str, Any]:
        # References are as large as logits are: whoever gets a copy computes them again.
        return vars(self) | {"references": None}
