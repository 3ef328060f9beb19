"""Structured training from the first step: fresh BLAST layers instead of fitted ones.

    plan = uniform_plan(model, batch, num_blocks=4, keep=0.5)       # or Plan.load, a searched plan
    model = from_scratch(model, plan)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=0.01))

Training from scratch is one of the two uses of the BLAST paper (arXiv 2410.21262); the other is
to factorise trained weights (apply.py).  How the learning rates were chosen: parameter_groups.
"""

from __future__ import annotations

import warnings
from math import gcd
from typing import Any

import torch
from torch import nn

from blast_search.apply import attach, model_fingerprint, plan_layers
from blast_search.batches import Batch
from blast_search.errors import FallbackWarning, IncompatibleInputError, UsageError
from blast_search.layers import Workload, dense_weight, get_modules, inventory
from blast_search.matrix import BlastLinear
from blast_search.plan import LayerPlan, Plan
from blast_search.space import Candidate, LayerSpec, SearchSpace


def uniform_plan(
    model: nn.Module,
    batch: Batch,
    num_blocks: int,
    keep: float,
    space: SearchSpace | None = None,
) -> Plan:
    """One block count and one fraction of the parameters for all layers; the model stays as is.

    The output head, tied weights and whatever `space` leaves out stay dense.  A layer whose
    sides `num_blocks` does not divide takes the largest smaller count that does (at worst 1,
    low rank), and one too small to save a parameter stays dense; a FallbackWarning names both.

    Args:
        batch: what the model is called with, once: it shows which layer is the output head.
        keep: of each layer's weight parameters; ranks are rounded as in a search.

    Raises:
        UsageError: num_blocks below 1, or keep outside (0, 1).
        IncompatibleInputError: the model cannot be called, or no layer may be replaced.
    """
    if num_blocks < 1:
        raise UsageError(f"num_blocks is {num_blocks}, expected 1 (low rank) or more.")
    if not 0 < keep < 1:
        raise UsageError(f"keep is {keep}, expected a fraction between 0 and 1 (both excluded).")
    space = space or SearchSpace()
    layers, skipped = inventory(model, [Workload("batch", batch)], space)
    if not layers:
        reasons = "; ".join(f"{name} {reason}" for name, reason in skipped.items())
        raise IncompatibleInputError(
            f"{type(model).__name__} has no Linear layer that may be replaced"
            f"{f' ({reasons})' if reasons else ''}. Check the model and the search space."
        )
    choices = {
        layer.name: space.uniform_choice(layer, _blocks(layer, num_blocks), keep)
        for layer in layers
    }
    _warn_of_fallbacks(layers, choices, num_blocks)
    return Plan(
        model={"name": type(model).__name__, "fingerprint": model_fingerprint(model)},
        layers={layer.name: LayerPlan.of(layer, choices[layer.name]) for layer in layers},
        budget={"num_blocks": num_blocks, "keep": keep},
    )


def _blocks(layer: LayerSpec, num_blocks: int) -> int:
    """The largest block count up to num_blocks that divides both sides."""
    common = gcd(*layer.shape)
    return next(b for b in range(num_blocks, 0, -1) if common % b == 0)


def _warn_of_fallbacks(
    layers: list[LayerSpec], choices: dict[str, Candidate], num_blocks: int
) -> None:
    others = [
        f"{layer.name} ({layer.out_features} x {layer.in_features}): {choices[layer.name].key}"
        for layer in layers
        if choices[layer.name].num_blocks != num_blocks
    ]
    if others:
        warnings.warn(
            f"{len(others)} of {len(layers)} layers cannot take num_blocks={num_blocks} and get "
            f"what fits: {', '.join(others)}.",
            FallbackWarning,
            stacklevel=3,
        )


def from_scratch(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace the plan's layers by untrained BlastLinear, in place; the model is also returned.

    As `apply`, but nothing is fitted: of a replaced weight only the standard deviation is kept
    (a model's own initialisation, such as GPT-2's 0.02, stays in force; a weight of zeros gives
    U = 0), and the bias as it is.  Everything is checked before the first module is touched;
    `save` works on the result.

    Raises:
        IncompatibleInputError: the plan does not fit the model.
    """
    layers = plan_layers(model, plan)
    modules: dict[str, nn.Module] = {
        name: _fresh(module, plan.choices[name])
        for name, module in get_modules(model, layers).items()
        if not plan.choices[name].is_dense
    }
    attach(model, layers, modules, plan)
    return model


@torch.no_grad()
def _fresh(linear: nn.Module, choice: Candidate) -> BlastLinear:
    layer = BlastLinear.empty_like(linear, choice.num_blocks, choice.rank)
    bias = None if layer.bias is None else layer.bias.clone()
    layer.reset_parameters()
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)
    rms = float(dense_weight(linear).float().square().mean().sqrt())
    size = rms * (3 * layer.in_features) ** 0.5  # relative to nn.Linear's own initialisation
    layer.U.mul_(size**0.5 if size else 0)
    layer.V.mul_(size**0.5 or 1)
    return layer


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: "rest", "U", "S" and "V" of all BLAST layers.

    Learning rate: all factors take `lr`, the rate that suits the dense model.  Theory says
    otherwise: Adam moves every element by about its rate, whatever its size, so a factor F moves
    A, relative to A's standard deviation, as a dense layer's update does if

        lr_F / lr = rms(F) / (rms(A) sqrt(3)),    U and V: (3 n / r)^(1/4) / sqrt(3)
                                                  S:       sqrt(3 n) / sqrt(3) = sqrt(n)

    (three equal, independent shares).  That leaves U and V near `lr` and gives S ten times as
    much and more.  Measured on a small vision transformer and a small language model
    (results/scratch): such rates help a little below the best `lr`, as a larger `lr` would, gain
    nothing at it and lose above it; and one rate for all has its best value within a factor of
    two of the dense model's.  So one rate is what this function gives; the groups are named to
    let you differ.

    Weight decay: a decoupled decay (AdamW) of factor F shrinks A by lr_F * decay_F per step, and
    A = U diag(s) V^T by the sum of all three.  Each factor therefore gets a third of
    `weight_decay`: A shrinks as the dense weight would.  Decaying one factor alone would let the
    others grow against it, as only the product matters.  Other parameters keep `weight_decay`.
    With an optimizer whose decay is an L2 penalty in the gradient (Adam, SGD) the thirds hold
    only roughly.

    Frozen parameters are left out; a parameter used twice is listed once.
    """
    factors: dict[str, list[nn.Parameter]] = {"U": [], "S": [], "V": []}
    for module in model.modules():
        if isinstance(module, BlastLinear):
            for name, found in factors.items():
                if name in module._parameters:  # low rank has no S to train
                    found.append(getattr(module, name))
    structured = {id(p) for found in factors.values() for p in found}
    rest = [p for p in model.parameters() if id(p) not in structured]
    groups = [("rest", rest, weight_decay)]
    groups += [(name, found, weight_decay / 3) for name, found in factors.items()]
    return [
        {"name": name, "params": trained, "lr": lr, "weight_decay": decay}
        for name, found, decay in groups
        if (trained := [p for p in found if p.requires_grad])
    ]
