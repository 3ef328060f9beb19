"""The Gram E[x x^T] of a layer's inputs: checked, regularised, and cut to what an option asks."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from blast_search.errors import IncompatibleInputError, SingularGramWarning

RIDGE = 1e-3  # of the Gram's mean diagonal: calibration data never spans the whole input space

Whitening = Literal["full", "block", "diagonal", "none"]


def regularised(gram: Tensor) -> Tensor:
    """The Gram (n, n) over its mean diagonal, plus a ridge of `RIDGE`; (n,) is a diagonal.

    Raises:
        IncompatibleInputError: not finite (NaN in the calibration data), or below zero somewhere
            on its diagonal.
    """
    if not bool(gram.isfinite().all()):
        raise IncompatibleInputError(
            "the Gram of a layer's inputs is not finite: the calibration data or an activation "
            "holds NaN or infinity. Check the calibration batches."
        )
    gram = torch.diag(gram) if gram.dim() == 1 else (gram + gram.T) / 2
    if bool((gram.diagonal() < 0).any()):
        raise IncompatibleInputError(
            "the Gram of a layer's inputs has negative elements on its diagonal, expected "
            "E[x x^T] or X^T X."
        )
    scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    return gram / scale + RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def warn_if_singular(gram: Tensor, name: str = "") -> None:
    """Warn where an eigenvalue of the Gram, scaled to a unit diagonal, is float32 rounding.

    Scaled, because a channel of small inputs is no defect: unscaled, real Grams of sentence
    encoders look singular at 1e-8 of their largest eigenvalue.
    """
    g = (torch.diag(gram) if gram.dim() == 1 else gram).double()
    scale = g.diagonal().clamp_min(0)
    dead = int((scale == 0).sum())
    scale = scale.clamp_min(1e-300).rsqrt()
    g = g * scale * scale[:, None]
    g.diagonal().sub_(torch.finfo(torch.float32).eps)
    if dead or int(torch.linalg.cholesky_ex(g)[1]):
        who = f"layer {name}: the" if name else "The"
        why = f"{dead} of {len(g)} inputs are always zero" if dead else "too few tokens?"
        warnings.warn(
            f"{who} Gram of the inputs is singular ({why}); a ridge of {RIDGE:g} times its mean "
            "diagonal stands in. More calibration data makes better factors.",
            SingularGramWarning,
            stacklevel=3,
        )


def cut(gram: Tensor, whitening: Whitening, num_blocks: int) -> Tensor | None:
    """What a whitening keeps of a regularised Gram (n, n): all, b diagonal blocks, the diagonal.

    Raises:
        ValueError: an unknown whitening.
    """
    if whitening == "full":
        return gram
    if whitening == "none":
        return None
    if whitening == "diagonal":
        return torch.diag(gram.diagonal())
    if whitening == "block":
        block = torch.arange(len(gram), device=gram.device) // (len(gram) // num_blocks)
        return gram * (block == block[:, None])
    raise ValueError(f"whitening={whitening!r}, expected full, block, diagonal or none.")


def diagonal_blocks(gram: Tensor, num_blocks: int) -> Tensor:
    """The diagonal blocks G_jj of (..., n, n): (..., b, q, q)."""
    q = gram.shape[-1] // num_blocks
    blocks = gram.reshape(*gram.shape[:-2], num_blocks, q, num_blocks, q)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous()
