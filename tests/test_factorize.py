"""Factorisation: closed forms, descent, the Gram's norm, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blast_search import BlastLinear, factorize
from blast_search.errors import IncompatibleInputError
from blast_search.factors import Factors
from blast_search.gram import regularised
from blast_search.lowrank import low_rank_basis
from blast_search.matrix import to_dense


def weight_and_gram(m: int = 48, n: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    x = torch.randn(300, n, generator=generator) @ torch.randn(n, n, generator=generator)
    x = x * torch.linspace(2, 0.05, n)
    return weight, x.T @ x / len(x)


def weighted_error(weight: Tensor, factors: Factors, gram: Tensor | None) -> float:
    e = (weight - to_dense(factors.U, factors.S, factors.V)).double()
    g = torch.eye(weight.shape[1]).double() if gram is None else regularised(gram.double())
    w = weight.double()
    return float(((e @ g * e).sum() / (w @ g * w).sum()).sqrt())


@pytest.mark.parametrize("use_gram", [False, True])
@pytest.mark.parametrize(("m", "n"), [(48, 64), (64, 48), (32, 32)])
@pytest.mark.parametrize("b", [1, 2, 4, 8])
def test_reported_error_is_the_real_one(m, n, b, use_gram):
    weight, gram = weight_and_gram(m, n)
    g = gram if use_gram else None
    factors = factorize(weight, b, 9, g)
    assert factors.U.shape == (b, m // b, 9)
    assert factors.V.shape == (b, n // b, 9)
    assert factors.S.shape == (b, b, 9)
    assert factors.error == pytest.approx(weighted_error(weight, factors, g), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("use_gram", [False, True])
def test_low_rank_is_the_optimum(use_gram):
    """b = 1 equals the SVD of A L with G = L L^T, the textbook solution."""
    weight, gram = weight_and_gram()
    g = regularised(gram.double()) if use_gram else torch.eye(64).double()
    values = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(g))
    wanted = float((values[12:].square().sum() / values.square().sum()).sqrt())
    factors = factorize(weight, 1, 12, gram if use_gram else None)
    assert factors.error == pytest.approx(wanted, rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([2, 4]), st.integers(1, 20), st.booleans(), st.integers(0, 50))
def test_blocks_never_lose_to_low_rank_of_the_same_rank(b, rank, use_gram, seed):
    weight, gram = weight_and_gram(24, 32, seed)
    g = gram if use_gram else None
    assert factorize(weight, b, rank, g).error <= low_rank_basis(weight, g).error(rank) + 1e-5


def test_more_sweeps_and_more_rank_never_hurt():
    weight, gram = weight_and_gram()
    errors = [factorize(weight, 4, 8, gram, sweeps=k).error for k in (0, 3, 10, 30)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
    by_rank = [factorize(weight, 2, r, gram).error for r in (2, 6, 12)]
    assert by_rank == sorted(by_rank, reverse=True)


def test_the_gram_matters():
    """Activation-aware factors beat blind ones where it counts, and b > 1 beats low rank."""
    weight, gram = weight_and_gram()
    blind = weighted_error(weight, factorize(weight, 4, 12), gram)
    aware = factorize(weight, 4, 12, gram).error
    assert aware < 0.8 * blind
    assert aware < factorize(weight, 1, 12, gram).error


def test_exact_cases():
    weight = torch.randn(16, 3) @ torch.randn(3, 24)
    assert factorize(weight, 1, 3).error < 1e-3
    assert factorize(weight, 4, 3).error < 1e-3
    assert factorize(torch.zeros(8, 8), 2, 2).error == 0
    tall = factorize(torch.randn(6, 4), 1, 6)  # rank beyond the matrix's own: zero padding
    assert tall.U.shape == (1, 6, 6)
    assert tall.error < 1e-3


def test_singular_gram_is_handled():
    weight, _ = weight_and_gram()
    x = torch.randn(5, 64)  # far fewer tokens than features
    for b in (1, 4):
        factors = factorize(weight, b, 8, x.T @ x)
        assert all(bool(t.isfinite().all()) for t in (factors.U, factors.V, factors.S))
        assert factors.error < 1


def test_factors_are_balanced_and_sorted():
    weight, gram = weight_and_gram()
    f = factorize(weight, 4, 10, gram)
    norms = f.U.norm(dim=(0, 1))
    torch.testing.assert_close(norms, f.V.norm(dim=(0, 1)), rtol=1e-3, atol=1e-4)
    assert bool((norms[:-1] >= norms[1:] - 1e-5).all())


def test_from_linear_and_conv1d_agree():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    linear = nn.Linear(32, 16)
    conv = transformers.Conv1D(16, 32)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    x = torch.randn(3, 32)
    ours = [BlastLinear.from_linear(layer, 2, 6)(x) for layer in (linear, conv)]
    torch.testing.assert_close(*ours)


def test_refusals():
    weight, gram = weight_and_gram()
    with pytest.raises(ValueError, match="must divide both sides"):
        factorize(weight, 5, 4)
    with pytest.raises(ValueError, match="rank=0"):
        factorize(weight, 2, 0)
    with pytest.raises(ValueError, match="gram is"):
        factorize(weight, 2, 4, gram[:3, :3])
    weight[0, 0] = float("nan")
    with pytest.raises(IncompatibleInputError, match="NaN"):
        factorize(weight, 2, 4)
    gram[0, 0] = float("inf")
    with pytest.raises(IncompatibleInputError, match="not finite"):
        factorize(torch.randn(48, 64), 2, 4, gram)
