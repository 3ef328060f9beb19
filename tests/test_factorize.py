"""Factorisation: closed forms, descent, the Gram's norm, and refusals."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blast_search import BlastLinear, als, descent, factorize, factorize_grid, factorize_many
from blast_search.errors import IncompatibleInputError, SingularGramWarning
from blast_search.factors import Factors, relative_error
from blast_search.gram import cut, diagonal_blocks, regularised
from blast_search.lowrank import low_rank_basis, whitened_svd
from blast_search.matrix import to_dense


def weight_and_gram(m: int = 48, n: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    x = torch.randn(300, n, generator=generator) @ torch.randn(n, n, generator=generator)
    x = x * torch.linspace(2, 0.05, n)
    return weight, x.T @ x / len(x)


def weighted_error(weight: Tensor, factors: Factors, gram: Tensor | None) -> float:
    e = weight.double() - to_dense(*(t.double() for t in (factors.U, factors.S, factors.V)))
    g = torch.eye(weight.shape[1]) if gram is None else gram
    g = (torch.diag(g) if g.dim() == 1 else g).double()
    w = weight.double()
    return float(((e @ g * e).sum() / (w @ g * w).sum()).sqrt())


def ridged_error(weight: Tensor, factors: Factors, gram: Tensor | None) -> float:
    """The error in the norm in which factors are the best ones."""
    return weighted_error(weight, factors, None if gram is None else regularised(gram.double()))


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
    assert factors.error == pytest.approx(weighted_error(weight, factors, g), rel=1e-6)


@pytest.mark.parametrize("use_gram", [False, True])
def test_low_rank_is_the_optimum(use_gram):
    """b = 1 equals the SVD of A L with G = L L^T, the textbook solution."""
    weight, gram = weight_and_gram()
    g = regularised(gram.double()) if use_gram else torch.eye(64).double()
    values = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(g))
    wanted = float((values[12:].square().sum() / values.square().sum()).sqrt())
    factors = factorize(weight, 1, 12, gram if use_gram else None)
    found = ridged_error(weight, factors, gram if use_gram else None)
    assert found == pytest.approx(wanted, rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([2, 4]), st.integers(1, 20), st.booleans(), st.integers(0, 50))
def test_blocks_never_lose_to_low_rank_of_the_same_rank(b, rank, use_gram, seed):
    weight, gram = weight_and_gram(24, 32, seed)
    g = gram if use_gram else None
    found = ridged_error(weight, factorize(weight, b, rank, g), g)
    assert found <= low_rank_basis(weight, g).error(rank) + 1e-5


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


@pytest.mark.parametrize("b", [1, 4])
@pytest.mark.parametrize("whitening", ["full", "block", "diagonal"])
def test_singular_gram_warns_and_works(b, whitening):
    weight, _ = weight_and_gram()
    x = torch.randn(5, 64)  # far fewer tokens than features
    with pytest.warns(SingularGramWarning, match=r"layer encoder\.0: the Gram"):
        factors = factorize(weight, b, 8, x.T @ x, whitening=whitening, name="encoder.0")
    assert all(bool(t.isfinite().all()) for t in (factors.U, factors.V, factors.S))
    assert factors.error < 1
    gram = weight_and_gram()[1]
    gram[7], gram[:, 7] = 0, 0
    with pytest.warns(SingularGramWarning, match="1 of 64 inputs are always zero"):
        factorize(weight, b, 8, gram)


def test_rank_deficiency_by_one_is_seen_and_bad_scaling_is_not():
    weight, _ = weight_and_gram()
    x = torch.randn(63, 64)
    with pytest.warns(SingularGramWarning):
        low_rank_basis(weight, x.T @ x, name="a")
    x = torch.randn(200, 64) * torch.logspace(-3, 3, 64)
    with warnings.catch_warnings(action="error"):
        low_rank_basis(weight, x.T @ x)


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


@pytest.mark.parametrize(("size", "b", "rank"), [(64, 64, 3), (8, 8, 2), (64, 32, 6)])
def test_blocks_of_single_elements_are_fitted(size: int, b: int, rank: int):
    """Their systems are singular, and solved after a step or two; the next ones are rounding."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    for dtype, most in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
        assert factorize(weight.to(dtype), b, rank).error < most


def test_what_no_number_can_hold_is_refused():
    weight = torch.randn(16, 16)
    for b in (1, 4):
        with pytest.raises(IncompatibleInputError, match="largest element is"):
            factorize(weight * 1e30, b, 4)
    gram = torch.eye(16)
    gram[3, 3] = -1
    with pytest.raises(IncompatibleInputError, match="negative elements on its diagonal"):
        factorize(weight, 4, 4, gram)
    gram = torch.eye(16) * 0.1 + 1 - 2 * torch.eye(16).flip(0)
    with pytest.raises(IncompatibleInputError, match="not positive semi-definite"):
        factorize(torch.randn(32, 16), 4, 4, gram)


def test_refusals():
    weight, gram = weight_and_gram()
    with pytest.raises(ValueError, match="must divide both sides"):
        factorize(weight, 5, 4)
    with pytest.raises(ValueError, match="rank=0"):
        factorize(weight, 2, 0)
    with pytest.raises(ValueError, match="gram is"):
        factorize(weight, 2, 4, gram[:3, :3])
    with pytest.raises(ValueError, match="gram is"):
        factorize(weight, 2, 4, gram[0, :3])
    with pytest.raises(ValueError, match="method='sgd'"):
        factorize(weight, 2, 4, method="sgd")
    with pytest.raises(ValueError, match="whitening='half'"):
        factorize(weight, 2, 4, gram, whitening="half")
    with pytest.raises(ValueError, match="no full Gram"):
        factorize(weight, 2, 4, gram, method="precgd")
    with pytest.raises(ValueError, match="one shape"):
        factorize_many([weight, weight.T], 2, 4)
    weight[0, 0] = float("nan")
    with pytest.raises(IncompatibleInputError, match="NaN"):
        factorize(weight, 2, 4)
    gram[0, 0] = float("inf")
    with pytest.raises(IncompatibleInputError, match="not finite"):
        factorize(torch.randn(48, 64), 2, 4, gram)


def planted(b: int, r: int, m: int = 48, n: int = 64, dtype=torch.float32) -> Tensor:
    shapes = ((b, m // b, r), (b, b, r), (b, n // b, r))
    return to_dense(*(torch.randn(*shape, dtype=dtype) for shape in shapes))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 24),
    st.sampled_from([None, "full", "block", "diagonal", "none", "1-D"]),
    st.sampled_from(["als", "adam", "precgd"]),
    st.integers(0, 99),
)
def test_error_is_that_of_the_dense_residual(b, rank, whitening, method, seed):
    """For every method and whitening, ranks beyond the block sides (3 to 48) included."""
    weight, gram = weight_and_gram(24, 32, seed)
    g = None if whitening is None else gram.diagonal() if whitening == "1-D" else gram
    option = whitening if whitening in ("full", "block", "diagonal", "none") else "full"
    if method == "precgd" and whitening == "full" and b > 1:
        method = "als"
    f = factorize(weight, b, rank, g, sweeps=4, whitening=option, method=method)
    assert f.U.shape == (b, 24 // b, rank)
    assert all(bool(t.isfinite().all()) for t in (f.U, f.S, f.V))
    assert f.error == pytest.approx(weighted_error(weight, f, g), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([2, 4, 8]),
    st.integers(1, 40),
    st.sampled_from(["none", "diagonal", "block", "full"]),
    st.integers(0, 99),
)
def test_monotone_and_never_above_the_start(b, rank, whitening, seed):
    weight, gram = weight_and_gram(24, 32, seed)
    errors: list[float] = []
    factorize(weight, b, rank, gram, whitening=whitening, on_sweep=errors.append)
    assert errors == sorted(errors, reverse=True)
    g = regularised(gram.double())
    target = cut(g, whitening, b)
    assert errors[-1] <= whitened_svd(weight, target).error(rank) + 1e-5


@pytest.mark.parametrize("whitening", ["none", "diagonal", "block", "full"])
def test_every_single_sweep_descends(whitening):
    """No sweep is saved by keeping the best state: the loss of each is below the last."""
    weight, gram = weight_and_gram()
    g = cut(regularised(gram.double()), whitening, 4)
    roots = None if g is None else torch.linalg.cholesky(diagonal_blocks(g, 4))[None]
    a = weight.double()[None]
    problem = als.BlockProblem(a, 4, roots)
    if whitening == "full":
        problem = als.FullProblem(a, 4, g[None], roots)
    low_rank = whitened_svd(weight.double(), g).factors(12, 4)
    state = problem.start((low_rank.U[None], low_rank.S[None], low_rank.V[None]))
    omega = torch.full((1, 1, 1, 1), problem.omega, dtype=torch.float64)
    for _ in range(60):
        new = problem.sweep(state, omega)
        assert float(new.loss) < float(state.loss)
        state = new
    error = float((state.loss / problem.norm).sqrt())
    u, s, v = (t[0] for t in problem.factors(state))
    assert error == pytest.approx(relative_error(weight, (u, s, v), g), rel=1e-6)


def test_planted_matrices_are_recovered():
    """Recovery needs more sweeps than the default; float64 takes over where float32 ends."""
    for seed in range(3):
        torch.manual_seed(seed)
        error = factorize(planted(4, 4), 4, 8, sweeps=300).error
        assert error < 1e-3
    low_rank = torch.randn(48, 5) @ torch.randn(5, 64)
    _, gram = weight_and_gram()
    for b in (1, 2, 4, 8):
        assert factorize(low_rank, b, 5).error < 1e-5
        assert factorize(low_rank, b, 5, gram).error < 1e-4


def test_float64_takes_over_where_float32_cannot_descend():
    """One huge eigenvalue, as outlier channels make it: float32 alone ends 4 % higher."""
    weight, gram = weight_and_gram()
    x = torch.randn(1, 64)
    gram = gram / gram.diagonal().mean() + 1e5 * x.T @ x
    single = factorize(weight, 2, 12, gram)
    double = factorize(weight.double(), 2, 12, gram.double())
    assert single.U.dtype == torch.float32
    assert single.error <= 1.01 * double.error


def test_float64_stays():
    weight, gram = weight_and_gram()
    f = factorize(weight.double(), 4, 9, gram.double())
    assert {t.dtype for t in (f.U, f.S, f.V)} == {torch.float64}
    single = factorize(weight, 4, 9, gram)
    assert single.U.dtype == torch.float32
    assert single.error == pytest.approx(f.error, rel=1e-3)
    assert factorize(weight.half(), 4, 9).U.dtype == torch.float32


@pytest.mark.parametrize("b", [1, 4])
@pytest.mark.parametrize("use_gram", [False, True])
def test_many_equal_one_by_one(b, use_gram):
    pairs = [weight_and_gram(seed=seed) for seed in range(4)]
    weights = [w * 10 ** (i - 2) for i, (w, _) in enumerate(pairs)]
    weights[2] = torch.randn(48, 3) @ torch.randn(3, 64)  # exact: goes on in float64
    grams = [g for _, g in pairs] if use_gram else None
    many = factorize_many(weights, b, 9, grams)
    for i, together in enumerate(many):
        alone = factorize(weights[i], b, 9, grams[i] if grams else None)
        assert together.error == pytest.approx(alone.error, rel=2e-3, abs=1e-5)
    assert factorize_many([], 2, 3) == []


def test_batches_are_cut_to_memory(monkeypatch):
    monkeypatch.setattr(sys.modules["blast_search.factorize"], "BATCH_BYTES", {"cpu": 1})
    weights = [weight_and_gram(seed=seed)[0] for seed in range(3)]
    errors = [f.error for f in factorize_many(weights, 4, 9)]
    assert errors == pytest.approx([factorize(w, 4, 9).error for w in weights], rel=1e-4)


@pytest.mark.parametrize("b", [1, 4])
@pytest.mark.parametrize("use_gram", [False, True])
def test_grid(b, use_gram):
    weight, gram = weight_and_gram()
    g = gram if use_gram else None
    ranks = [20, 4, 8, 12, 60]
    grid = factorize_grid(weight, b, ranks, g)
    basis = low_rank_basis(weight, g)
    assert sorted(grid) == sorted(ranks)
    for rank, f in grid.items():
        assert f.U.shape == (b, 48 // b, rank)
        assert ridged_error(weight, f, g) <= basis.error(rank) + 1e-5
        assert f.error == pytest.approx(weighted_error(weight, f, g), rel=1e-6)
        assert f.error <= factorize(weight, b, rank, g, sweeps=3).error + 1e-5
    again = factorize_grid(weight, b, sorted(ranks), g)
    assert all(torch.equal(again[r].U, grid[r].U) for r in ranks)
    assert factorize_grid(weight, b, []) == {}


def test_precgd_follows_its_published_schedule():
    """Against a literal float64 transcription: autograd, dense reconstruction, LU."""
    a = planted(4, 4, 24, 32, torch.float64)
    ours: list[float] = []
    u, s, _ = descent.precgd(a, 4, 4, 100, seed=3, on_step=ours.append)
    generator = torch.Generator().manual_seed(3)
    x = {
        "u": torch.randn(4, 6, 4, generator=generator).double() * 0.001 / 2,
        "v": torch.randn(4, 8, 4, generator=generator).double() * 0.001 / 2,
        "s": torch.randn(4, 4, 4, generator=generator).double(),
    }
    target = a / a.std()
    for t in range(100):
        for name in "uvs":
            x[name].requires_grad_()
            loss = (target - to_dense(x["u"], x["s"], x["v"])).square().sum()
            (gradient,) = torch.autograd.grad(loss, x[name])
            x[name] = x[name].detach()
            damping = 0.1 * loss.detach().sqrt() * torch.eye(4).double()
            gu, gv = x["u"].mT @ x["u"], x["v"].mT @ x["v"]
            if name == "u":
                h = torch.einsum("ija,jac,ijc->iac", x["s"], gv, x["s"])
            elif name == "v":
                h = torch.einsum("ija,iac,ijc->jac", x["s"], gu, x["s"])
            else:
                h = gu[:, None] * gv[None]
            h = h + damping
            move = (
                torch.linalg.solve(h, gradient.mT).mT
                if name != "s"
                else torch.linalg.solve(h, gradient[..., None])[..., 0]
            )
            x[name] = x[name] - (1 - t / 100) * move  # of a loss without 1/2
    torch.testing.assert_close(u, x["u"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(s, x["s"] * a.std(), rtol=1e-3, atol=1e-5)
    assert ours[50:] == sorted(ours[50:], reverse=True)


def test_precgd_recovers_a_planted_matrix():
    """r equals the planted rank: the paper's exact recovery (not from every start)."""
    a = planted(4, 4, 24, 32, torch.float64)
    finals = []
    for seed in range(4):
        errors: list[float] = []
        factorize(a, 4, 4, method="precgd", seed=seed, on_sweep=errors.append)
        assert len(errors) == 300
        assert errors[150:] == sorted(errors[150:], reverse=True)
        finals.append(errors[-1])
    assert min(finals) < 1e-4


def test_als_needs_far_fewer_sweeps_than_the_references():
    weight, _ = weight_and_gram()
    published = factorize(weight, 4, 12, method="precgd").error
    adam = factorize(weight, 4, 12, method="adam").error
    best = factorize(weight, 4, 12, sweeps=100).error
    assert best <= min(published, adam) * 1.01
    assert best < low_rank_basis(weight).error(12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu():
    weight, gram = weight_and_gram()
    for g in (None, gram):
        cpu = factorize(weight, 4, 12, g)
        gpu = factorize(weight.cuda(), 4, 12, None if g is None else g.cuda())
        assert gpu.U.is_cuda
        assert gpu.error == pytest.approx(cpu.error, rel=1e-2)


@pytest.mark.parametrize("full", [False, True])
def test_little_room_changes_only_the_order_of_sums(full, monkeypatch):
    """Couplings, normal matrices and row Grams in one piece, and block row by block row."""
    weight = torch.randn(24, 32, dtype=torch.float64)
    x = torch.randn(200, 32, dtype=torch.float64)
    g = x.T @ x / 200 if full else None
    found = []
    for room in (1 << 26, 1):
        monkeypatch.setattr(als, "ROOM", {"cpu": room})
        found.append(factorize(weight, 4, 5, g, 6))
    for key in ("U", "S", "V"):
        torch.testing.assert_close(getattr(found[0], key), getattr(found[1], key))
