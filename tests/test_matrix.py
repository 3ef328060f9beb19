"""The BLAST product against the dense oracle, for every kernel and a market of shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from blast_search import BlastLinear, blast_matmul
from blast_search.kernels import choose, get_couple
from blast_search.matrix import to_dense

SHAPES = [  # out_features, in_features, b, r
    (8, 8, 1, 3), (12, 8, 2, 1), (24, 48, 4, 5), (48, 24, 3, 7), (32, 64, 8, 9), (64, 32, 16, 2),
]  # fmt: skip
INPUTS = [(1,), (7,), (2, 3), (0,), (600,), (2, 2, 2)]  # leading shapes; 600 > one CPU chunk


def factors(m: int, n: int, b: int, r: int, dtype: torch.dtype = torch.float64):
    return (
        torch.randn(b, m // b, r, dtype=dtype),
        torch.randn(b, b, r, dtype=dtype),
        torch.randn(b, n // b, r, dtype=dtype),
    )


def block_by_block(u, s, v):
    """A_ij = U_i diag(s_ij) V_j^T, straight from the definition."""
    b = len(u)
    rows = [
        torch.cat([u[i] @ torch.diag(s[i, j]) @ v[j].T for j in range(b)], 1) for i in range(b)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize(("m", "n", "b", "r"), SHAPES)
def test_to_dense_is_the_definition(m, n, b, r):
    u, s, v = factors(m, n, b, r)
    torch.testing.assert_close(to_dense(u, s, v), block_by_block(u, s, v))


@pytest.mark.parametrize("leading", INPUTS)
@pytest.mark.parametrize(("m", "n", "b", "r"), SHAPES)
def test_product_equals_dense(m, n, b, r, leading):
    u, s, v = factors(m, n, b, r)
    x = torch.randn(*leading, n, dtype=torch.float64)
    torch.testing.assert_close(blast_matmul(x, u, s, v), x @ block_by_block(u, s, v).T)


@pytest.mark.parametrize("kernel", ["torch", "numba"])
@pytest.mark.parametrize(("m", "n", "b", "r"), [s for s in SHAPES if s[2] > 1])
def test_every_kernel_equals_dense(kernel, m, n, b, r):
    wide = factors(m, n, b, r)
    x = torch.randn(2 * n, 37).T[:, :n]  # not contiguous
    with torch.inference_mode():
        y = blast_matmul(x, *(t.float() for t in wide), kernel=kernel)
    torch.testing.assert_close(
        y.double(), x.double() @ block_by_block(*wide).T, rtol=1e-4, atol=1e-4
    )


def test_a_wrong_kernel_would_be_noticed():
    """The parity check can fail: a coupling that forgets the last block is not equal."""
    z, s = torch.randn(4, 5, 3), torch.randn(4, 4, 3)
    good = get_couple("torch")(z, s)
    z[-1] = 0
    with pytest.raises(AssertionError):
        torch.testing.assert_close(get_couple("numba")(z, s), good)


def test_kernel_choice_is_explicit():
    assert choose(1, torch.float32, "cpu") == "lowrank"
    assert choose(4, torch.float32, "cpu") == "numba"
    assert choose(4, torch.float32, "cpu", inference=False) == "torch"
    assert choose(4, torch.bfloat16, "cpu") == "torch"
    assert choose(4, torch.float16, "cuda") == "torch"
    with pytest.raises(ValueError, match="expected 'numba' or 'torch'"):
        get_couple("magic")


@pytest.mark.parametrize(("m", "n", "b", "r"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_gradients(m, n, b, r, tokens):
    x, u, s, v = (
        t[: min(len(t), 99)].requires_grad_()
        for t in (torch.randn(tokens, n).double(), *factors(m, n, b, r))
    )
    assert torch.autograd.gradcheck(lambda *a: blast_matmul(*a), (x, u, s, v), fast_mode=True)


def test_special_cases_of_the_algebra():
    b, p, q, r = 4, 3, 5, 2
    u, s, v = factors(b * p, b * q, b, r)
    low_rank = u.reshape(-1, r) @ v.reshape(-1, r).T
    torch.testing.assert_close(to_dense(u, torch.ones_like(s), v), low_rank)
    eye = torch.eye(b).double().unsqueeze(-1).expand(b, b, r)
    blocks = torch.block_diag(*(u[i] @ v[i].T for i in range(b)))
    torch.testing.assert_close(to_dense(u, eye, v), blocks)
    # Monarch / block low rank of block rank t: r = b t with one-hot slots (i + j) mod b.
    t = 2
    left, right = torch.randn(b, b, p, t).double(), torch.randn(b, b, q, t).double()
    u, v = torch.zeros(b, p, b * t).double(), torch.zeros(b, q, b * t).double()
    s = torch.zeros(b, b, b * t).double()
    for i in range(b):
        for j in range(b):
            slot = slice((i + j) % b * t, ((i + j) % b + 1) * t)
            u[i, :, slot], v[j, :, slot], s[i, j, slot] = left[i, j], right[i, j], 1
    wanted = torch.cat(
        [torch.cat([left[i, j] @ right[i, j].T for j in range(b)], 1) for i in range(b)]
    )
    torch.testing.assert_close(to_dense(u, s, v), wanted)


@pytest.mark.parametrize(("m", "n", "b", "r"), SHAPES)
def test_parameters_are_counted_by_the_formula(m, n, b, r):
    layer = BlastLinear(n, m, b, r, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == r * (m + n + b * b)


def test_layer_is_a_drop_in():
    layer = BlastLinear(24, 12, 4, 3)
    x = torch.randn(5, 24)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.to_dense(), layer.bias))
    torch.testing.assert_close(layer.weight, layer.to_dense())
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin(x), y)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y.detach(), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_autocast_and_half_precision():
    layer = BlastLinear(32, 16, 4, 8)
    x = torch.randn(6, 32)
    wanted = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), wanted, rtol=0.05, atol=0.05)
    with torch.no_grad():
        y = layer.bfloat16()(x.bfloat16())
    torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.05)


def test_fresh_layer_has_the_variance_of_a_linear_layer():
    torch.manual_seed(1)
    x = torch.randn(512, 256)
    dense = nn.Linear(256, 512, bias=False)(x).var()
    for b, r in ((1, 64), (4, 64), (8, 32)):
        ratio = BlastLinear(256, 512, b, r, bias=False)(x).var() / dense
        assert 0.8 < ratio < 1.25, (b, r, float(ratio))


def test_impossible_layers_are_refused():
    with pytest.raises(ValueError, match="num_blocks=5 must divide"):
        BlastLinear(24, 12, 5, 3)
    with pytest.raises(ValueError, match="rank=0"):
        BlastLinear(24, 12, 4, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fvcore traces with torch.jit
def test_bmm_macs_agree_with_fvcore():
    from fvcore.nn import FlopCountAnalysis

    m, n, b, r, tokens = 24, 48, 4, 6, 10
    layer = BlastLinear(n, m, b, r, bias=False).eval()
    with torch.no_grad():
        count = FlopCountAnalysis(layer, torch.randn(tokens, n)).unsupported_ops_warnings(False)
        count.uncalled_modules_warnings(False)
        # fvcore does not see the coupling (multiply and sum): b^2 r per token.
        assert count.total() == tokens * r * (m + n)
