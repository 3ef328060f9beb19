"""The structures inside BLAST: exact recovery, optimality, native sizes, and use in a layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blast_search import BlastLinear, Candidate
from blast_search.gram import cut, regularised
from blast_search.matrix import to_dense
from blast_search.retrain import trainable_parameters
from blast_search.structured import (
    CPU_CHUNK,
    BlockDiagonal,
    Monarch,
    diagonal_choice,
    empty_layer,
    fit_structure,
    monarch_choice,
)
from blast_search.structures import Structured, block_diagonal, low_rank, monarch


def gram_of(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    return x.T @ x / len(x)


def dense(structured: Structured) -> Tensor:
    f = structured.factors
    return to_dense(f.U, f.S, f.V)


def loss(weight: Tensor, approximation: Tensor, gram: Tensor | None) -> float:
    e = (weight - approximation).double()
    g = torch.eye(len(e.T)).double() if gram is None else regularised(gram.double())
    return float((e @ g * e).sum())


SHAPES = [(24, 32), (32, 24), (16, 16)]


@pytest.mark.parametrize("candidate", [Candidate(2, 3), BlockDiagonal(2, 0), Monarch(2, 2)])
def test_what_was_frozen_stays_frozen(candidate: Candidate):
    for weight, bias in ((True, False), (False, True)):
        linear = nn.Linear(8, 6)
        linear.weight.requires_grad_(weight)
        linear.bias.requires_grad_(bias)
        parameters = dict(empty_layer(linear, candidate).named_parameters())
        assert parameters.pop("bias").requires_grad is bias
        assert {p.requires_grad for p in parameters.values()} == {weight}


@pytest.mark.parametrize("use_gram", [False, True])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("b", [1, 2, 4])
def test_planted_structures_are_exact(m, n, b, use_gram):
    gram = gram_of(n) if use_gram else None
    weight = torch.randn(m, 3) @ torch.randn(3, n)
    assert low_rank(weight, 3, gram, b).factors.error < 1e-5
    weight = torch.block_diag(*torch.randn(b, m // b, n // b))
    assert block_diagonal(weight, b, gram).factors.error < 1e-5
    blocks = torch.randn(b, b, m // b, 2) @ torch.randn(b, b, 2, n // b)
    weight = blocks.transpose(1, 2).reshape(m, n)
    assert monarch(weight, b, 2, gram).factors.error < 1e-5


@pytest.mark.parametrize("use_gram", [False, True])
def test_structure_and_native_size(use_gram):
    weight, gram = torch.randn(24, 32), gram_of(32) if use_gram else None
    result = low_rank(weight, 5, gram, 4)
    assert result.parameters == 5 * (24 + 32)
    assert torch.linalg.matrix_rank(dense(result), rtol=1e-5) == 5
    result = block_diagonal(weight, 4, gram)
    assert result.parameters == 24 * 32 // 4
    mask = torch.block_diag(*torch.ones(4, 6, 8)) > 0
    assert bool((dense(result)[~mask] == 0).all())
    result = monarch(weight, 4, 2, gram)
    assert result.parameters == 16 * 2 * (6 + 8)
    assert result.factors.U.shape == (4, 6, 8)
    blocks = dense(result).reshape(4, 6, 4, 8).transpose(1, 2)
    assert bool((torch.linalg.matrix_rank(blocks, rtol=1e-5) == 2).all())


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(SHAPES), st.booleans(), st.integers(0, 99))
def test_block_diagonal_is_optimal(shape, use_gram, seed):
    """The residual is orthogonal to what any block could add."""
    torch.manual_seed(seed)
    weight, gram = torch.randn(shape), gram_of(shape[1], seed) if use_gram else None
    best = dense(block_diagonal(weight.double(), 4, gram))
    g = torch.eye(shape[1]).double() if gram is None else regularised(gram.double())
    gradient = (weight.double() - best) @ g
    mask = torch.block_diag(*torch.ones(4, shape[0] // 4, shape[1] // 4)) > 0
    assert float(gradient[mask].abs().max()) < 1e-6 * float((weight.double() @ g).abs().max())


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_monarch_closed_form_and_descent(m, n):
    """Exact where blocks decouple; under a full Gram below that solution and random nudges."""
    weight, gram = torch.randn(m, n).double(), gram_of(n).double()
    blind = monarch(weight, 4, 2)
    values = torch.linalg.svdvals(weight.reshape(4, m // 4, 4, n // 4).transpose(1, 2))
    wanted = float((values[..., 2:].square().sum() / values.square().sum()).sqrt())
    assert blind.factors.error == pytest.approx(wanted, rel=1e-6)
    aware = monarch(weight, 4, 2, gram)
    mean = gram.diagonal().mean()  # so that both are regularised alike
    block = cut(gram, "block", 4)
    assert block is not None
    assert float(block.diagonal().mean()) == pytest.approx(float(mean))
    decoupled = monarch(weight, 4, 2, block)
    best = loss(weight, dense(aware), gram)
    assert best < loss(weight, dense(decoupled), gram)
    assert best < loss(weight, dense(blind), gram)


def test_structures_run_in_a_layer():
    weight, x = torch.randn(24, 32), torch.randn(5, 32)
    for result in (low_rank(weight, 5, None, 4), block_diagonal(weight, 4), monarch(weight, 4, 2)):
        f = result.factors
        layer = BlastLinear(32, 24, 4, f.S.shape[-1], bias=False)
        layer.set_factors(f)
        torch.testing.assert_close(layer(x), x @ dense(result).T, rtol=1e-4, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="must divide"):
        block_diagonal(torch.randn(9, 8), 2)
    with pytest.raises(ValueError, match="block_rank=0"):
        monarch(torch.randn(8, 8), 2, 0)


CANDIDATES = [BlockDiagonal(1, 0), BlockDiagonal(4, 0), Monarch(1, 3), Monarch(4, 2)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.key)
def test_native_layers_compute_the_structure(candidate, m, n, bias):
    """With and without gradients (two code paths), above one chunk of tokens, any batch shape."""
    linear = nn.Linear(n, m, bias)
    factors = fit_structure(linear.weight.detach(), candidate, gram_of(n))
    layer = empty_layer(linear, candidate).set_factors(factors)
    weight = to_dense(factors.U, factors.S, factors.V)
    for shape in ((3, n), (2, 5, n), (CPU_CHUNK + 3, n), (n,)):
        x = torch.randn(shape)
        wanted = nn.functional.linear(x, weight, linear.bias)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    strided = torch.randn(6, 2 * n)[:, ::2]
    with torch.no_grad():
        wanted = nn.functional.linear(strided, weight, linear.bias)
        torch.testing.assert_close(layer(strided), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.key)
def test_native_layers_count_train_and_save(candidate):
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where installed

    linear = nn.Linear(32, 24)
    layer = empty_layer(linear, candidate)
    assert sum(p.numel() for n, p in layer.named_parameters() if n != "bias") == candidate.params(
        24, 32
    )
    x = torch.randn(7, 32)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == 2 * 7 * candidate.params(24, 32)
    y.square().sum().backward()
    chosen = {id(p) for p in trainable_parameters(nn.Sequential(layer))}
    assert chosen == {id(p) for p in layer.parameters()}
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())
    again = empty_layer(linear, candidate)
    again.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(layer(x), again(x))
    double = empty_layer(linear.double(), candidate)
    assert torch.autograd.gradcheck(double, torch.randn(3, 32).double().requires_grad_())


def test_choices_of_uniform_structures():
    assert diagonal_choice(24, 32, 5) is None
    assert monarch_choice(24, 32, 5, 0.5, 8) is None
    assert monarch_choice(24, 32, 2, 0.99, 1) is None  # saves nothing
    sizes = [monarch_choice(384, 1536, 4, k, 8).params(384, 1536) for k in (0.1, 0.3, 0.5)]
    assert [s / (384 * 1536) for s in sizes] == pytest.approx([0.1, 0.3, 0.5], rel=0.1)
    assert monarch_choice(384, 1536, 4, 0.3, 8).rank % 2 == 0
    keys = {c.key for c in (Candidate(4, 2), Monarch(4, 2), BlockDiagonal(4, 0))}
    assert len(keys) == 3  # measurements are filed under these
    assert Candidate(4, 2) != Monarch(4, 2)
