"""How far a plan's model is from the dense one: its layers are fitted, put in place, and called.

A `Judge` holds all that this takes.  It is sent to Ray workers as it is (panel.py), which keep the
model between plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from blast_search.batches import Batch, call_model, to_device
from blast_search.fitting import Fitter
from blast_search.fused import differentiable, unfused
from blast_search.layers import swapped
from blast_search.outputs import divergence, divergences, reference_outputs
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
    references: Sequence[Mapping[str, Tensor]] | None = None

    def wanted(self) -> Sequence[Mapping[str, Tensor]]:
        """What the dense model is judged by, by batch."""
        if self.references is None:
            self.references = reference_outputs(self.model, list(self.batches))
        return self.references

    def gradients(self, choices: Choices, order: Sequence[int]) -> dict[str, Tensor]:
        """d loss / d W of every layer's effective weight (m, n) in a plan's model.

        W is what the layer computes, W x, dense or not.  The loss is the mean over the batches.

        Returns:
            Layer name -> (m, n) float32 on the CPU; layers that the output does not depend on are
            left out.

        Raises:
            RuntimeError: the model's output cannot be differentiated, or the gradient is not
                finite.
        """
        modules, wanted = self.fitter.modules(choices), self.wanted()
        found: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[..., Tensor]:
            def differentiate(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
                x = args[0] if args else next(iter(kwargs.values()))
                rows = x.detach().reshape(-1, x.shape[-1])
                version = None if x.is_inference() else x._version
                # Parameters are frozen, so the first layer's output is where the graph begins.
                y = output if output.requires_grad else output.detach().requires_grad_().clone()

                def add(gradient: Tensor) -> None:
                    if version is not None and x._version != version:  # rows are its memory
                        raise RuntimeError(f"the model changes the input of {name} in place")
                    g = gradient.reshape(-1, gradient.shape[-1])
                    product = (g.mT.float() @ rows.float()).div_(len(order)).cpu()
                    found[name] = found[name].add_(product) if name in found else product

                y.register_hook(add)  # type: ignore[no-untyped-call]
                return y

            return differentiate

        with ExitStack() as stack:
            stack.enter_context(swapped(self.model, self.layers, modules))
            stack.enter_context(frozen(self.model))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(differentiable(self.model))
            stack.enter_context(unfused())
            for layer in self.layers:
                hook = modules[layer.name].register_forward_hook(
                    watch(layer.name), with_kwargs=True
                )
                stack.callback(hook.remove)
            for k in order:
                batch = self.batches[k]
                output = call_model(self.model, to_device(batch, self.model))
                divergence(output, wanted[k], batch).backward()  # type: ignore[no-untyped-call]
        if not all(bool(g.isfinite().all()) for g in found.values()):
            raise RuntimeError("the gradient is not finite")
        return found

    def losses(self, question: Question) -> list[float]:
        """Divergence of the plan's model from the dense one, batch by batch.

        Returns:
            One number per batch of `question.order`; fewer where the plan was given up.
        """
        wanted = self.wanted()
        choices, order, bar = question.choices, question.order, question.bar
        layers = [layer for layer in self.layers if layer.name in choices]
        batches = [self.batches[k] for k in order]
        references = [wanted[k] for k in order]
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


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it, no parameter takes a gradient."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
