"""A plan carried over to an updated dense checkpoint, from the old factors.

The new weights are fitted again, starting where the old fit ended: a few sweeps reach what a cold
start needs many for.  Everything else (norms, biases, embeddings, dense layers) comes from the
new checkpoint as it is, and so do the Grams, where there are calibration batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from blast_search.apply import attach, plan_layers
from blast_search.batches import Batch
from blast_search.calibrate import as_batches, collect_grams
from blast_search.errors import IncompatibleInputError
from blast_search.factorize import factorize
from blast_search.factors import Factors, relative_error
from blast_search.layers import dense_weight
from blast_search.matrix import BlastLinear
from blast_search.modelfolder import load
from blast_search.plan import Plan
from blast_search.progress import SILENT, Reporter

# On weights moved by 1 to 5 %, two ended below 30 sweeps from a cold start (384 x 768, b = 4).
REFRESH_SWEEPS = 4


@dataclass(frozen=True)
class Refit:
    """Relative errors on the new weight (in its Gram's norm), of the old and the new factors."""

    before: float
    after: float


def refresh(
    folder: str | Path,
    model_factory: Callable[[], nn.Module],
    calibration: Iterable[Batch] | None = None,
    report: Reporter = SILENT,
) -> tuple[nn.Module, dict[str, Refit]]:
    """The saved model of `folder` on the dense checkpoint that `model_factory` builds.

    Args:
        calibration: batches that make the factors activation-aware, as for `apply`.

    Returns:
        The new model, not saved, with the plan on it (what was measured of the old model taken
        out), and the errors per replaced layer.  No layer's factors are worse than the old ones.

    Raises:
        IncompatibleInputError: a checkpoint with other layers or shapes, by name; see `load`.
    """
    plan = Plan.load(folder)
    old = load(folder, model_factory)
    model = model_factory()
    layers = plan_layers(model, plan)
    chosen = [layer for layer in layers if not plan.choices[layer.name].is_dense]
    batches = None if calibration is None else as_batches(calibration)
    grams = {} if batches is None else collect_grams(model, chosen, batches)
    modules: dict[str, nn.Module] = {}
    errors: dict[str, Refit] = {}
    with report.stage("refresh", len(chosen)) as advance:
        for layer in chosen:
            previous, linear = old.get_submodule(layer.name), model.get_submodule(layer.name)
            assert isinstance(previous, BlastLinear)
            module = BlastLinear.empty_like(linear, previous.num_blocks, previous.rank)
            try:
                factors, errors[layer.name] = refit(
                    dense_weight(linear), previous, grams.get(layer.name), layer.name
                )
            except IncompatibleInputError as error:
                raise IncompatibleInputError(f"layer {layer.name}: {error}") from error
            module.set_factors(factors)
            modules[layer.name] = module
            advance()
    carried = replace(plan, measured={}, baselines={}, weights_sha256="")
    attach(model, layers, modules, carried)
    return model, errors


@torch.no_grad()
def refit(
    weight: Tensor, previous: BlastLinear, gram: Tensor | None, name: str = ""
) -> tuple[Factors, Refit]:
    """Factors of a new weight (m, n) from those of an older one; the better of the two."""
    u, v, s = (t.detach().to(weight.device) for t in (previous.U, previous.V, previous.S))
    kept = Factors(u, v, s, relative_error(weight, (u, s, v), gram))
    fitted = factorize(weight, len(u), u.shape[-1], gram, REFRESH_SWEEPS, initial=kept, name=name)
    best = min(fitted, kept, key=lambda f: f.error)
    return best, Refit(kept.error, best.error)
