"""Dense weight (and the Gram of its inputs) -> BLAST factors.

The objective is || (A - A_hat) G^(1/2) ||_F with G = E[x x^T], the mean squared error of the
layer's output on the calibration data; G = I where no Gram is given.

b = 1 has a closed form, the whitened SVD (lowrank.py).  b > 1 starts there and goes on with
over-relaxed alternating least squares (als.py); descent.py has the published method.  Tried and
dropped: random starts (1-4 % worse than the SVD), block-diagonal whitening alone (loses to b = 1
on real activations; it is only a start here).

Shapes: matrix.py's legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from blast_search import als, descent
from blast_search.errors import IncompatibleInputError
from blast_search.factors import Factors, Triple, balanced, check_blocks, relative_error
from blast_search.gram import Whitening, cut, diagonal_blocks, regularised, warn_if_singular
from blast_search.lowrank import LowRankBasis, whitened_svd
from blast_search.matrix import to_dense
from blast_search.modes import exact_products

SWEEPS = 40  # 30 end where the published method does at b = 16, 40 are 1.5 % better
GRID_SWEEPS = 8  # per further rank of a grid
BATCH_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}  # on a GPU at most a quarter of what is free

Method = Literal["als", "precgd", "adam"]
OnSweep = Callable[[float], None]


@torch.no_grad()
@exact_products()  # sweeps are judged to float32 rounding
def factorize(
    weight: Tensor,
    num_blocks: int,
    rank: int,
    gram: Tensor | None = None,
    sweeps: int | None = None,
    basis: LowRankBasis | None = None,
    *,
    method: Method = "als",
    whitening: Whitening = "full",
    name: str = "",
    seed: int = 0,
    initial: Factors | None = None,
    on_sweep: OnSweep | None = None,
) -> Factors:
    """The BLAST factors of a weight (m, n).

    Args:
        gram: E[x x^T] of the layer's inputs, (n, n), or its diagonal (n,); None for the plain
            Frobenius error.
        sweeps: passes over U, S and V (b > 1); None: 40 for als, else 300.
        basis: the weight's LowRankBasis where it is at hand (same Gram, whitening "full").
        method: "als"; "precgd", the published one (arXiv 2410.21262, algorithm 2; no full Gram);
            or "adam".
        whitening: how much of the Gram to fit to: "full", the b diagonal "block"s, "diagonal" or
            "none".  The error is in the full Gram's norm in any case.
        name: the layer's, for warnings.
        seed: of precgd's start.
        initial: factors of these shapes to start from beside the SVD, for instance those of an
            older checkpoint (als only; b = 1 needs no start).
        on_sweep: called after every sweep with the relative error of the objective so far.

    Returns:
        Factors in the weight's device and float32 (float64 stays), with their error in the
        Gram's norm.  What is made small is the error under the Gram and a ridge of gram.RIDGE:
        in that norm, als is never worse than the best rank-`rank` matrix, nor than `initial`.

    Raises:
        ValueError: num_blocks does not divide both sides, rank < 1, a Gram or `initial` of other
            size, an unknown option, or precgd with a full Gram.
        IncompatibleInputError: NaN or infinity in the weight, the Gram or the factors, or a Gram
            that is not positive semi-definite.

    Warns:
        SingularGramWarning: the Gram is singular (not checked where `basis` is given:
        low_rank_basis did).
    """
    a, g = _checked(weight, num_blocks, rank, gram)
    if g is not None and gram is not None and basis is None:
        warn_if_singular(gram, name)
    target = None if g is None else cut(g, whitening, num_blocks)
    full = target is not None and whitening == "full" and num_blocks > 1 and _is_full(gram)
    report = None if on_sweep is None else (lambda loss: on_sweep(max(0.0, float(loss)) ** 0.5))
    if method == "precgd":
        factors = _precgd(a, num_blocks, rank, target, full, sweeps, seed, report)
    else:
        basis = basis if basis and whitening == "full" else whitened_svd(a, target, rank)
        start = basis.factors(rank, num_blocks)
        if method == "adam":
            count = descent.ADAM_SWEEPS if sweeps is None else sweeps
            factors = descent.adam(a, (start.U, start.S, start.V), target, count, report)
        elif method != "als":
            raise ValueError(f"method={method!r}, expected als, precgd or adam.")
        elif num_blocks == 1:
            return _finished(a, gram, (start.U, start.S, start.V), normal=False)
        else:
            count = SWEEPS if sweeps is None else sweeps
            starts = [start] if initial is None else [start, _like(initial, start)]
            rough = initial is None
            factors = _fit([a], num_blocks, [starts], [target], full, count, report, rough)[0]
    return _finished(a, gram, factors)


@torch.no_grad()
@exact_products()
def factorize_many(
    weights: Sequence[Tensor],
    num_blocks: int,
    rank: int,
    grams: Sequence[Tensor | None] | None = None,
    sweeps: int = SWEEPS,
    *,
    whitening: Whitening = "full",
    names: Sequence[str] = (),
) -> list[Factors]:
    """As factorize, for many weights of one shape: their sweeps run as one batch (b > 1).

    Pays where small kernels wait for each other (GPUs, small layers).  Each layer stops on its
    own and equals its single fit up to rounding.  Batches take at most about 1 GB (8 on a GPU).

    Raises:
        ValueError: as factorize, or weights of several shapes, or Grams for only some.
    """
    grams = list(grams) if grams else [None] * len(weights)
    names = names or [""] * len(weights)
    if len({w.shape for w in weights}) > 1 or len({g is None for g in grams}) > 1:
        raise ValueError("factorize_many takes weights of one shape, with Grams for all or none.")
    full = whitening == "full" and any(_is_full(g) for g in grams)
    items = list(zip(weights, grams, names, strict=True))
    results: list[Factors] = []
    if not items:
        return results
    size = max(1, _room(weights[0].device) // _bytes(weights[0], num_blocks, rank, full))
    for first in range(0, len(items), size):
        checked, targets, starts = [], [], []
        for weight, gram, name in items[first : first + size]:
            a, g = _checked(weight, num_blocks, rank, gram)
            if gram is not None:
                warn_if_singular(gram, name)
            checked.append(a)
            targets.append(None if g is None else cut(g, whitening, num_blocks))
            starts.append(whitened_svd(a, targets[-1], rank).factors(rank, num_blocks))
        fitted: Sequence[Triple] = [(s.U, s.S, s.V) for s in starts]
        if num_blocks > 1:
            fitted = _fit(checked, num_blocks, [[s] for s in starts], targets, full, sweeps)
        results += [
            _finished(a, gram, f, normal=num_blocks > 1)
            for a, gram, f in zip(checked, grams[first : first + size], fitted, strict=True)
        ]
    return results


@torch.no_grad()
@exact_products()
def factorize_grid(
    weight: Tensor,
    num_blocks: int,
    ranks: Sequence[int],
    gram: Tensor | None = None,
    sweeps: int = SWEEPS,
    *,
    name: str = "",
) -> dict[int, Factors]:
    """Factors at several ranks for little more than the largest one's time.

    From the smallest rank up: it is fitted as by factorize; each next one adds the best low-rank
    matrix of what the one below leaves over, and takes GRID_SWEEPS sweeps.  Six ranks of real
    layers took 1.2 to 1.7 times the largest's time (one by one: 3 to 4 times) and ended between
    what factorize reaches in 10 and in 30 sweeps.  (Going down, from the
    strongest components of the rank above, ended worse than 10 sweeps from the SVD.)

    Returns:
        rank -> Factors, each never worse than the best matrix of that rank.  They depend on the
        set of ranks.

    Raises, Warns:
        as factorize.
    """
    ascending = sorted(set(ranks))
    if not ascending:
        return {}
    a, g = _checked(weight, num_blocks, ascending[0], gram)
    if gram is not None:
        warn_if_singular(gram, name)
    basis = whitened_svd(a, g, ascending[-1])
    if num_blocks == 1:
        starts = [basis.factors(r) for r in ascending]
        return {
            r: _finished(a, gram, (f.U, f.S, f.V), normal=False)
            for r, f in zip(ascending, starts, strict=True)
        }
    full = _is_full(gram)
    result: dict[int, Factors] = {}
    below: Factors | None = None
    for rank in ascending:
        start, count, rough = basis.factors(rank, num_blocks), sweeps, True
        if below:
            extended, lost = _extended(a, g, below, rank)
            if lost <= basis.error(rank) ** 2 * basis.total:
                start, count, rough = extended, min(GRID_SWEEPS, sweeps), False
        fitted = _fit([a], num_blocks, [[start]], [g], full, count, rough=rough)[0]
        result[rank] = below = _finished(a, gram, fitted)
    return result


def _checked(
    weight: Tensor, num_blocks: int, rank: int, gram: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The weight in its working dtype, and the regularised Gram (n, n)."""
    check_blocks(weight, num_blocks)
    n = weight.shape[1]
    if rank < 1:
        raise ValueError(f"rank={rank}, expected at least 1.")
    if gram is not None and gram.shape not in ((n, n), (n,)):
        raise ValueError(f"gram is {tuple(gram.shape)}, expected ({n}, {n}) or ({n},).")
    if not bool(weight.isfinite().all()):
        raise IncompatibleInputError("the weight holds NaN or infinity.")
    a = weight.detach()
    a = a if a.dtype == torch.float64 else a.float()
    return a, None if gram is None else regularised(gram.to(a))


def _like(initial: Factors, start: Factors) -> Factors:
    """`initial` in the dtype and on the device of `start`, whose shapes it must have."""
    pairs = [(getattr(initial, key), getattr(start, key)) for key in ("U", "V", "S")]
    for given, own in pairs:
        if given.shape != own.shape:
            raise ValueError(f"initial has a {tuple(given.shape)}, expected {tuple(own.shape)}.")
    u, v, s = (given.detach().to(own) for given, own in pairs)
    return Factors(u, v, s, math.nan)


def _is_full(gram: Tensor | None) -> bool:
    return gram is not None and gram.dim() == 2


def _fit(
    weights: Sequence[Tensor],
    b: int,
    starts: Sequence[Sequence[Factors]],
    grams: Sequence[Tensor | None],
    full: bool,
    sweeps: int,
    report: als.OnSweep | None = None,
    rough: bool = True,
) -> list[Triple]:
    """als.fit on weights of one shape; in float64 from there on where float32 is exhausted."""
    a = torch.stack(list(weights))
    present = [g for g in grams if g is not None]
    g = torch.stack(present) if present else None
    stacked = [_stack(layers) for layers in zip(*starts, strict=True)]
    factors, poor = als.fit(a, b, stacked, g, full, sweeps, report, rough)
    if a.dtype != torch.float64 and bool(poor.any()):
        at = poor.nonzero().squeeze(1)
        refined, _ = als.fit(
            a[at].double(),
            b,
            [tuple(x[at].double() for x in start) for start in (*stacked, factors)],  # type: ignore[misc]
            None if g is None else g[at].double(),
            full,
            sweeps,
            report,
            rough=False,
        )
        for x, y in zip(factors, refined, strict=True):
            x[at] = y.to(x.dtype)
    return [(u, s, v) for u, s, v in zip(*factors, strict=True)]


def _stack(layers: Sequence[Factors]) -> Triple:
    u, s, v = (torch.stack(list(x)) for x in zip(*((f.U, f.S, f.V) for f in layers), strict=True))
    return u, s, v


def _finished(a: Tensor, gram: Tensor | None, factors: Triple, normal: bool = True) -> Factors:
    u, s, v = balanced(factors) if normal else factors
    error = relative_error(a, (u, s, v), gram)
    if not math.isfinite(error):
        most = f"the weight's largest element is {float(a.abs().max()):.2g}"
        raise IncompatibleInputError(f"no finite factors: {most}. Scale it down.")
    return Factors(u, v, s, error)


def _precgd(
    a: Tensor,
    b: int,
    rank: int,
    gram: Tensor | None,
    full: bool,
    sweeps: int | None,
    seed: int,
    report: OnSweep | None,
) -> Triple:
    """PrecGD on the weight whitened by the Gram's diagonal blocks."""
    if full:
        raise ValueError('precgd fits no full Gram: pass whitening="block", or method="als".')
    count = descent.PRECGD_SWEEPS if sweeps is None else sweeps
    if gram is None:
        return descent.precgd(a, b, rank, count, seed, report)
    roots = torch.linalg.cholesky(diagonal_blocks(gram, b))
    white = (torch.unflatten(a, 1, (b, -1)).transpose(0, 1) @ roots).transpose(0, 1).flatten(1)
    u, s, v = descent.precgd(white, b, rank, count, seed, report)
    return u, s, torch.linalg.solve_triangular(roots.mT, v, upper=True)


def _extended(a: Tensor, gram: Tensor | None, below: Factors, rank: int) -> tuple[Factors, float]:
    """`below` plus the best low-rank matrix of its residual, and the squared error left."""
    more = rank - below.S.shape[-1]
    basis = whitened_svd(a - to_dense(below.U, below.S, below.V), gram, more)
    extra = basis.factors(more, len(below.V))
    u, v, s = (
        torch.cat(pair, -1)
        for pair in ((below.U, extra.U), (below.V, extra.V), (below.S, extra.S))
    )
    return Factors(u, v, s, math.nan), basis.error(more) ** 2 * basis.total


def _room(device: torch.device) -> int:
    """Bytes that a batch of fits may take."""
    most = BATCH_BYTES.get(device.type, BATCH_BYTES["cpu"])
    return min(most, torch.cuda.mem_get_info(device)[0] // 4) if device.type == "cuda" else most


def _bytes(a: Tensor, b: int, rank: int, full: bool) -> int:
    """About what the fit of one layer holds at a time."""
    m, n = a.shape
    numbers = 4 * m * n + 4 * b * rank * (m + n) + 4 * b * rank**2
    if full:
        numbers += 3 * n * n + 3 * (b * rank) ** 2
    return numbers * max(4, a.element_size())
