"""The BLAST product against the dense oracle, for every kernel and a market of shapes."""

from __future__ import annotations

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from blast_search import BlastLinear, blast_matmul, kernels, product
from blast_search.kernels import choose, composed, coupling, cpu, small, tiled, vectors
from blast_search.kernels.kept import work_space
from blast_search.matrix import to_dense

SHAPES = [  # out_features, in_features, b, r
    (8, 8, 1, 3), (12, 8, 2, 1), (24, 48, 4, 5), (48, 24, 3, 7), (32, 64, 8, 9), (64, 32, 16, 2),
]  # fmt: skip
INPUTS = [(1,), (7,), (2, 3), (0,), (600,), (2, 2, 2)]  # leading shapes; 600: several passes


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


# out_features, in_features, b, r: r = 1, odd, below and above a vector, a multiple of it
KERNEL_SHAPES = [
    (24, 48, 2, 9), (48, 24, 3, 8), (32, 64, 4, 19), (64, 32, 8, 16), (64, 96, 16, 13),
    (10, 20, 5, 24), (12, 8, 4, 1), (140, 33, 1, 9), (96, 64, 1, 40),
]  # fmt: skip
TOLERANCE = {
    torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-12,
}  # fmt: skip


@pytest.fixture(
    params=["float32", "float64", "bfloat16", "bfloat16 upcast", "float16", "float16 upcast"]
)
def dtype(request, monkeypatch):
    """Half types twice: as on a CPU that has products for them, and as on one that has not."""
    name, _, upcast = request.param.partition(" ")
    monkeypatch.setattr(kernels, "emulated", lambda dtype: bool(upcast) and dtype.itemsize == 2)
    kernels._choose.cache_clear()
    yield getattr(torch, name)
    kernels._choose.cache_clear()


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    """Within the dtype's tolerance of the float64 oracle, relative to its largest value."""
    assert found.dtype == dtype
    error = (found.double() - wanted).abs().max() if found.numel() else torch.zeros(())
    return bool(
        error <= TOLERANCE[dtype] * wanted.abs().max().clamp_min(1) if found.numel() else True
    )


def oracle(x, u, s, v, bias, grad):
    """Output and gradients by the dense matrix in float64."""
    leaves = [t.double().detach().requires_grad_() for t in (x, u, s, v, bias)]
    a = block_by_block(*leaves[1:4])
    y = leaves[0] @ a.T + leaves[4]
    return y.detach(), torch.autograd.grad(y, leaves, grad.double())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [0, 1, 6, 7, 70, 515])
@pytest.mark.parametrize(("m", "n", "b", "r"), KERNEL_SHAPES)
def test_forward_and_gradients_against_the_oracle(m, n, b, r, tokens, dtype, threads, monkeypatch):
    monkeypatch.setattr(cpu, "SERIAL_MACS", 0)
    monkeypatch.setattr(small, "SERIAL_MACS", 0 if threads > 1 else 10**9)
    monkeypatch.setattr(composed, "PASS_NUMBERS", 0)  # passes of MIN_PASS tokens
    monkeypatch.setattr(composed, "DIRECT_OUTPUT", 10_000)
    monkeypatch.setattr(tiled, "SERIAL_MACS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensors = [t.to(dtype) for t in (*factors(m, n, b, r), torch.randn(m))]
        x = torch.randn(2 * n, max(tokens, 1)).T[:tokens, :n].to(dtype)  # not contiguous
        grad = torch.randn(tokens, m).to(dtype)
        wanted, gradients = oracle(x, *tensors, grad)
        leaves = [t.detach().requires_grad_() for t in (x, *tensors)]
        y = blast_matmul(*leaves)
        assert close(y.detach(), wanted, dtype)
        for found, exact in zip(torch.autograd.grad(y, leaves, grad), gradients, strict=True):
            assert close(found, exact, dtype)
        with torch.inference_mode():
            assert close(blast_matmul(*(t.detach() for t in leaves)), wanted, dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("b", [2, 3, 4, 8, 16, 32])
def test_the_compiled_coupling_equals_the_reference(b, dtype):
    for tokens, r in ((1, 8), (5, 11), (33, 40)):
        z, g = (torch.randn(b, tokens, r).to(dtype) for _ in range(2))
        s = torch.randn(b, b, r).to(dtype)
        wide = [t.double() for t in (z, g, s)]
        assert close(cpu.couple(z, s), coupling("torch").couple(wide[0], wide[2]), dtype)
        ds = coupling("torch").couple_grad(wide[1], wide[0])
        assert close(cpu.couple_grad(g, z), ds, torch.float32)


def test_a_wrong_kernel_would_be_noticed():
    """The parity check can fail: a coupling that forgets the last block is not equal."""
    z, s = torch.randn(4, 5, 9), torch.randn(4, 4, 9)
    good = coupling("torch").couple(z.double(), s.double())
    assert close(cpu.couple(z, s), good, torch.float32)
    z[-1] = 0
    assert not close(cpu.couple(z, s), good, torch.float32)


def test_nan_is_not_rounded_away_in_bfloat16():
    z, s = torch.ones(2, 3, 8).bfloat16(), torch.ones(2, 2, 8).bfloat16()
    z[0, 1, 4] = float("nan")
    assert cpu.couple(z, s).isnan().sum() == 2


def test_kernel_choice_is_explicit():
    many, few = 512, 3
    assert choose(1, 64, torch.float32, "cpu", many) == "tiled"
    assert choose(4, 64, torch.float32, "cpu", many) == "tiled"
    assert choose(4, 64, torch.bfloat16, "cpu", few) == "small"
    assert choose(1, 64, torch.float32, "cpu", few) == "small"
    assert choose(4, 64, torch.float32, "cpu", few) == "small"
    assert choose(4, 4, torch.float32, "cpu", few) == "torch"  # less than one vector
    assert choose(4, 64, torch.float32, "cpu", 8 * torch.get_num_threads()) == "tiled"
    assert choose(64, 64, torch.float32, "cpu", few) == "torch"
    assert choose(4, 64, torch.float64, "cpu", few) == "torch"
    assert choose(1, 64, torch.float16, "cuda", 1) == "triton"
    assert choose(1, 64, torch.float16, "cuda", 2) == "lowrank"
    assert choose(64, 64, torch.float16, "cuda", many) == "triton"
    assert choose(65, 64, torch.float16, "cuda", many) == "torch"
    assert choose(65, 64, torch.float16, "cuda", 1) == "torch"
    assert choose(4, 64, torch.float16, "cuda", few) == "triton"
    assert choose(4, 64, torch.float64, "cuda", few) == "torch"
    assert kernels.label("numba").startswith("numba-")
    assert kernels.label("numba") != kernels.label("torch")
    with pytest.raises(ValueError, match="expected one of lowrank"):
        coupling("magic")


def test_threads_do_not_share_their_work_space():
    with ThreadPoolExecutor(2) as pool:
        barrier = Barrier(2)

        def place(_: int) -> int:
            barrier.wait(10)  # both threads at work: one alone could serve both calls
            return work_space(8).data_ptr()

        found = {*pool.map(place, range(2)), work_space(8).data_ptr()}
    assert len(found) == 3


@pytest.mark.parametrize("tokens", [3, 70])
def test_strided_inputs(tokens):
    """Expanded and overlapping rows, a bias that is every other number."""
    u, s, v = factors(24, 48, 4, 9, torch.float32)
    bias, a = torch.randn(48)[::2], to_dense(u, s, v)
    row, line = torch.randn(1, 48), torch.randn(tokens + 47)
    for x in (row.expand(tokens, 48), line.unfold(0, 48, 1), torch.randn(48, tokens).T):
        with torch.inference_mode():
            torch.testing.assert_close(
                blast_matmul(x, u, s, v, bias), x @ a.T + bias, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("wide", [False, True], ids=["8 lanes", "16 lanes"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [8, 9, 33, 143])
@pytest.mark.parametrize(
    ("m", "n", "b", "r"),
    [(64, 64, 1, 8), (16, 600, 1, 16), (96, 40, 4, 17), (210, 70, 5, 33), (512, 32, 16, 100)],
)
def test_tiles_with_vectors_of_any_width(m, n, b, r, tokens, bias, wide, monkeypatch):
    """Columns and tokens that fill no vector, panel or group; more k than one pass takes."""
    monkeypatch.setattr(vectors, "_wide", lambda: wide)
    u, s, v = (t.float() for t in factors(m, n, b, r))
    x, add = torch.randn(tokens, n), torch.randn(m) if bias else None
    found = tiled.forward(x, u, s, v, add)
    wanted = x.double() @ block_by_block(u.double(), s.double(), v.double()).T
    assert close(found, wanted if add is None else wanted + add, torch.float32)


def test_what_does_not_fill_a_vector_is_not_tiled():
    assert tiled.fits(8, 8, 8)
    assert not tiled.fits(7, 8, 8)
    assert not tiled.fits(8, 7, 8)
    assert not tiled.fits(8, 8, 7)


@pytest.mark.parametrize(("tokens", "width", "threads"), [(17, 64, 16), (512, 1152, 2), (3, 1, 1)])
def test_tiles_share_the_tokens(tokens, width, threads):
    size = tiled.tile_size(tokens, width, threads)
    assert size % kernels.GROUP == 0
    assert 0 < size <= tiled.MAX_TILE
    tiles = -(-tokens // size)
    assert tiles <= threads or tiles % threads in (0, threads - 1)


@pytest.mark.parametrize("b", [1, 4])
def test_half_types_are_computed_in_float32_where_the_cpu_lacks_them(b, dtype):
    half = dtype.itemsize == 2
    name = choose(b, 64, dtype, "cpu", 512)
    assert (name == "upcast") == (half and kernels.emulated(dtype))
    assert choose(b, 64, dtype, "cuda", 512) != "upcast"


def test_float32_and_float64_are_never_emulated():
    assert not kernels.emulated(torch.float32)
    assert not kernels.emulated(torch.float64)


def test_compiled_kernels_leave_the_number_of_threads_alone(project):
    """Numba's own threading layer changed PyTorch's OpenMP threads behind its back."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from blast_search.kernels import cpu\n"
        "cpu.SERIAL_MACS = 0\n"
        "cpu.couple(torch.randn(2, 64, 16), torch.randn(2, 2, 16))\n"
        "from torch.__config__ import parallel_info\n"
        "print(torch.get_num_threads(), parallel_info())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 ")
    assert "omp_get_max_threads() : 1" in done.stdout


def test_operator_passes_pytorchs_own_checks():
    tensors = [t.float().requires_grad_() for t in (torch.randn(5, 64), *factors(32, 64, 4, 9))]
    bias = torch.randn(32, requires_grad=True)
    torch.library.opcheck(product._operator, (*tensors, bias))
    torch.library.opcheck(product._operator, (*tensors, None))


@pytest.mark.parametrize("b", [1, 4])
def test_export_and_compile_pass_through(b):
    layer = BlastLinear(64, 32, b, 8).eval()
    x = torch.randn(3, 5, 64)
    wanted = layer(x)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), wanted)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    assert layer.U.grad is not None


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


@pytest.mark.parametrize(("m", "n"), [(256, 256), (512, 128), (128, 512)])
@pytest.mark.parametrize("b", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_fresh_layer_scales_signals_and_gradients_as_a_linear_layer(m, n, b, keep):
    layer = BlastLinear(n, m, b, max(1, round(keep * m * n / (m + n + b * b))), bias=False)
    x, gradient = torch.randn(512, n, requires_grad=True), torch.randn(512, m)
    y = layer(x)
    y.backward(gradient)
    # nn.Linear: weights uniform in +-n^(-1/2), variance 1 / (3 n)
    assert float(y.detach().var()) == pytest.approx(1 / 3, rel=0.12)
    assert float(x.grad.var()) == pytest.approx(m / (3 * n), rel=0.12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fresh_layer_has_full_rank_and_even_rows(dtype):
    layer = BlastLinear(128, 64, 4, 20, dtype=dtype)
    dense = layer.to_dense().detach().double()
    assert int(torch.linalg.matrix_rank(dense, rtol=1e-3)) == 64  # b r = 80
    rows = dense.reshape(4, 16, 128).square().mean((1, 2)) * 3 * 128
    assert rows.min() > 0.9
    assert rows.max() < 1.1
    assert BlastLinear(128, 64, 4, 20, device="meta").S.is_meta


@pytest.mark.parametrize("trained", ["U", "S", "V", "bias"])
def test_one_trained_parameter_gets_its_gradient(trained):
    layer = BlastLinear(32, 16, 4, 9).requires_grad_(False)
    getattr(layer, trained).requires_grad_(True)
    layer(torch.randn(40, 32)).sum().backward()
    assert getattr(layer, trained).grad.abs().sum() > 0


@pytest.mark.parametrize("tokens", [1, 40])
def test_operands_that_do_not_fit_are_refused(tokens):
    layer = BlastLinear(32, 16, 4, 9)
    with torch.no_grad():
        for x in (torch.randn(tokens, 36), torch.randn(tokens, 32).bfloat16()):
            with pytest.raises(RuntimeError, match="expected one dtype and device"):
                layer(x)
        with pytest.raises(RuntimeError, match="expected one dtype and device"):
            blast_matmul(torch.randn(tokens, 32), layer.U, layer.S[:, :, :8], layer.V)
        with pytest.raises(RuntimeError, match="expected one dtype and device"):
            blast_matmul(torch.randn(tokens, 32), layer.U, layer.S, layer.V, torch.randn(15))


def test_impossible_layers_are_refused():
    with pytest.raises(ValueError, match="num_blocks=5 must divide"):
        BlastLinear(24, 12, 5, 3)
    with pytest.raises(ValueError, match="rank=0"):
        BlastLinear(24, 12, 4, 0)


def test_the_first_count_of_a_process_sees_blast_layers():
    code = (
        "import torch, blast_search as bs\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    bs.BlastLinear(48, 24, 4, 6)(torch.randn(10, 48)).sum().backward()\n"
        "print(counter.get_total_flops())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exact, again = 10 * 6 * (24 + 48 + 16), 10 * 6 * (48 + 16)
    assert int(done.stdout) == 2 * (3 * exact + again)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fvcore traces with torch.jit
@pytest.mark.parametrize("b", [1, 2, 4])
def test_macs_are_exact_in_both_counters(b):
    from fvcore.nn import FlopCountAnalysis
    from torch.utils.flop_counter import FlopCounterMode

    m, n, r, tokens = 24, 48, 6, 10
    exact = tokens * r * (m + n + b * b)
    layer = BlastLinear(n, m, b, r).eval()
    x = torch.randn(2, tokens // 2, n)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * exact
    with torch.no_grad():
        count = FlopCountAnalysis(layer, x).set_op_handle(**product.fvcore_handles())
        assert count.total() == exact
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    again = tokens * r * (n + b * b)
    assert counter.get_total_flops() == 2 * (3 * exact + again)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_low_rank_on_a_gpu(tokens):
    layer = BlastLinear.from_linear(nn.Linear(128, 192, device="cuda"), 1, 32)
    x = torch.randn(tokens, 128, device="cuda")
    exact = x.double() @ layer.to_dense().double().T + layer.bias.double()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            found = layer(x)
        assert ((found - exact).norm() / exact.norm()).item() < 1e-3


@pytest.mark.parametrize("assign", [False, True])
def test_a_replacement_of_low_rank_has_couplings_of_one(assign):
    layer = BlastLinear.empty_like(nn.Linear(8, 6), 1, 2)
    assert [name for name, _ in layer.named_parameters()] == ["U", "V", "bias"]
    assert set(layer.state_dict()) == {"U", "S", "V", "bias"}
    assert bool((layer.S == 1).all())
    state = layer.state_dict() | {"S": torch.tensor([3.0, -2.0]).view(1, 1, 2)}
    state = {name: value.clone() for name, value in state.items()}
    dense = to_dense(state["U"], state["S"], state["V"])
    given = state["U"].clone()
    layer.load_state_dict(state, assign=assign)  # as an older version may have saved it
    assert bool((layer.S == 1).all())
    assert layer.U.requires_grad
    torch.testing.assert_close(layer.to_dense(), dense)
    assert torch.equal(state["U"], given)
