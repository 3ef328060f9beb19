"""Outputs: which tensors a model is judged by, and how far two outputs are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blast_search.batches import Batch, call_model, calling, to_device
from blast_search.errors import IncompatibleInputError
from blast_search.fused import unfused

LOGITS = "logits"
SPANS = ("start_logits", "end_logits")  # (B, L): of question answering, a number for each token
PARTS = 8  # of a GPU's free memory, references take one of so many at most


def output_tensors(output: Any) -> dict[str, Tensor]:
    """The tensors that carry an output's meaning; "logits" are those of classes.

    A tensor stands for itself.  Of a container (dict, tuple, list, dataclass) these are all
    floating tensors that it holds directly: a model with several heads is judged by all of them.
    Scalars, most often a loss, count only where there is nothing else; hidden states, which
    Hugging Face models return on the way to their logits, do not count beside these.  Of a
    container that holds none directly, it is the first one deeper inside.

    Raises:
        IncompatibleInputError: there is no floating tensor.
    """
    if isinstance(output, Tensor) and output.is_floating_point():
        return {"": output}
    direct = {
        name: value
        for name, value in _items(output)
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    if any(LOGITS in name for name in direct):
        direct = {name: value for name, value in direct.items() if "hidden_state" not in name}
    if found := {name: value for name, value in direct.items() if value.dim()}:
        return found
    deep = [value for value in _tensors(output) if value.is_floating_point()]
    if deep:
        return {"": next((value for value in deep if value.dim()), deep[0])}
    raise IncompatibleInputError(
        f"the model returned {type(output).__name__} without a floating tensor. Expected a "
        "tensor, a tuple or an output with .logits: wrap the model so that it returns one."
    )


def _items(output: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds, by name or place."""
    if isinstance(output, Mapping):
        yield from ((str(name), value) for name, value in output.items())
    elif isinstance(output, tuple | list):
        names = getattr(output, "_fields", range(len(output)))
        yield from ((str(name), value) for name, value in zip(names, output, strict=True))
    elif is_dataclass(output) and not isinstance(output, type):
        yield from ((field.name, getattr(output, field.name)) for field in fields(output))
    elif hasattr(output, LOGITS):
        yield LOGITS, output.logits


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors inside an output, depth first."""
    if isinstance(output, Tensor):
        yield output
    for _, value in _items(output):
        yield from _tensors(value)


def token_mask(batch: Batch, shape: tuple[int, ...], flat: bool = False) -> Tensor | None:
    """A boolean (B, L) mask of real tokens where the batch has one that fits `shape`.

    Where encoder and decoder have as many tokens, it is not known whose they are: no mask.

    Args:
        flat: `shape` is (B * L, width), of tokens that the model flattened; the mask, too, then.
    """
    if not isinstance(batch, Mapping):
        return None

    def fitting(key: str) -> Tensor | None:
        value = batch.get(key)
        if not isinstance(value, Tensor) or value.dim() != 2:
            return None
        if not flat:
            return value if value.shape == shape[:2] else None
        # Of one token per row, what the model pooled has as many rows.
        return value.flatten() if value.numel() == shape[0] and value.shape[1] > 1 else None

    encoder, decoder = fitting("attention_mask"), fitting("decoder_attention_mask")
    if encoder is not None and (decoder is not None or fitting("decoder_input_ids") is not None):
        return None
    mask = decoder if encoder is None else encoder
    return None if mask is None else mask.bool()


def divergence(output: Any, reference: Any, batch: Batch) -> Tensor:
    """How far an output is from the dense model's: the loss that the search minimises, a scalar.

    KL(dense || compressed) in nats per position for logits; otherwise the squared error relative
    to the reference's squared norm; of several tensors (`output_tensors`) the sum.  Padding is
    left out.

    Classes are in the last dimension, or in the second of images (B, classes, height, width).  One
    alone is no distribution but a number (regression), for which it is the squared error, too.

    Raises:
        IncompatibleInputError: the outputs hold other tensors, or tensors of other sizes.
    """
    found, wanted = output_tensors(output), output_tensors(reference)
    sizes = [{name: list(t.shape) for name, t in tensors.items()} for tensors in (found, wanted)]
    if sizes[0] != sizes[1]:
        raise IncompatibleInputError(
            f"the output of a compressed model has the sizes {sizes[0]}, that of the dense one "
            f"{sizes[1]}. What is judged must not change its size with the values: wrap the model "
            "so that it returns what comes before (the scores of all boxes, for instance)."
        )
    parts = [_divergence(found[name], wanted[name], name, batch) for name in wanted]
    return torch.stack(parts).sum()


def _real(output: Tensor, name: str, batch: Batch) -> Tensor:
    """What is judged of an output, without padding; the classes of images last."""
    if name == LOGITS and output.dim() == 4:
        output = output.movedim(1, -1)
    flat = output.dim() == 2 and name not in SPANS
    mask = token_mask(batch, tuple(output.shape), flat) if output.dim() > 1 else None
    return output if mask is None else output[mask.to(output.device)]


def _divergence(found: Tensor, wanted: Tensor, name: str, batch: Batch) -> Tensor:
    found, wanted, logits = found.float(), wanted.to(found.device).float(), name == LOGITS
    found, wanted = _real(found, name, batch), _real(wanted, name, batch)
    width = wanted.shape[-1] if wanted.dim() else 1
    if not wanted.numel():  # one of several outputs may be empty, and is 0 apart
        return found.sum()
    if logits and width > 1:
        found, wanted = (t.reshape(-1, width).log_softmax(-1) for t in (found, wanted))
        return F.kl_div(found, wanted, log_target=True, reduction="batchmean")
    # Of a head that is zero in the dense model, there is no relative error.
    energy, error = wanted.square().sum(), (found - wanted).square().sum()
    return torch.where(energy > 0, error / energy.clamp_min(1e-12), 0.0 * error)


@torch.no_grad()
def reference_outputs(model: nn.Module, batches: list[Batch]) -> list[dict[str, Tensor]]:
    """What the dense model is judged by (`output_tensors`) on the calibration batches.

    On the model's device, as far as they fill no more than a part of a GPU's memory: logits of
    language models are large.

    Raises:
        IncompatibleInputError: the model cannot be called with a batch, or its output is not
            finite, or nothing in it can be judged (an empty batch, or one of padding alone).
    """
    outputs, room = [], _room(next(model.parameters()).device)
    for index, batch in enumerate(batches):
        expected = "batches as the first one: check the task's calibration()."
        with calling(f"calibration batch {index}", expected), unfused():
            tensors = output_tensors(call_model(model, to_device(batch, model)))
        if not any(_real(value, name, batch).numel() for name, value in tensors.items()):
            raise IncompatibleInputError(
                f"calibration batch {index} is empty, or all of it is padding (attention_mask): "
                "nothing of the model's output on it can be judged. Leave it out of calibration()."
            )
        for name, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise IncompatibleInputError(
                    f"the model's output{name and f' {name}'} on calibration batch {index} is not "
                    "finite (NaN or infinity). Check the calibration data and the weights; if it "
                    "is meant to be so, wrap the model so that it returns what is finite."
                )
        room -= sum(value.nbytes for value in tensors.values())
        # Copies: an output may be a view into a much larger tensor, or a buffer of the model's.
        place = None if room > 0 else "cpu"
        outputs.append({name: value.to(place, copy=True) for name, value in tensors.items()})
    return outputs


def _room(device: torch.device) -> float:
    """Bytes of a device that references may take."""
    return torch.cuda.mem_get_info(device)[0] / PARTS if device.type == "cuda" else math.inf


@torch.no_grad()
def divergences(
    model: nn.Module, batches: Sequence[Batch], references: Sequence[Mapping[str, Tensor]]
) -> Iterator[float]:
    """`divergence` of one calibration batch after another."""
    for batch, reference in zip(batches, references, strict=True):
        with unfused():
            output = call_model(model, to_device(batch, model))
        yield float(divergence(output, reference, batch))
