"""Triton kernels against the float64 dense oracle: every kernel, config, dtype and edge shape.

Without a GPU the kernels run in Triton's interpreter on CPU tensors. With one they are compiled,
and the same cases (marked gpu) run there instead.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from contextlib import nullcontext, suppress

import pytest
import torch

from blast_search.matrix import to_dense

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:  # which reads the variable when it defines its own functions
        pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.errors import OutOfResources

from blast_search.kernels import triton as kernel
from blast_search.kernels import triton_kernels as k
from blast_search.kernels import triton_tune as tune

INTERPRETED = type(k._down).__name__ == "InterpretedFunction"
# Triton 3.6's interpreter; with numpy 2.4 and later it cannot run loops at all.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    # Padding is computed along, and may hold anything.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # ||error|| / ||y||
SHAPES = [  # m, n, b, r
    (8, 8, 1, 3), (12, 8, 2, 1), (48, 24, 3, 7), (24, 48, 4, 24), (40, 144, 8, 9), (64, 32, 16, 2),
]  # fmt: skip
PLAIN = (24, 48, 4, 24)
# Several tiles along every axis, none of them full.
TILED, WIDE = (150, 280, 2, 140), (40, 1120, 8, 40)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if (request.param == "cpu") != INTERPRETED:
        pytest.skip("compiled kernels need CUDA tensors, interpreted ones CPU tensors")
    return request.param


@pytest.fixture
def choose(monkeypatch):
    """Sets which candidate each choice takes; without a call, the first of each."""
    wanted: dict[str, object] = {}

    def pick(name, case, candidates, run, device, nested=False, capturing=None):
        return wanted.get(name, candidates[0])

    monkeypatch.setattr(tune, "pick", pick)
    return wanted.update


@pytest.fixture(autouse=True)
def _poisoned_and_untuned(choose):
    """Fresh memory holds NaN, so that an element no kernel writes is seen; nothing is timed."""
    if INTERPRETED:
        torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case(shape, tokens: int, dtype: torch.dtype, device: str):
    """x, u, s, v, bias with outputs of about unit variance."""
    m, n, b, r = shape

    def random(*size, scale=1.0):
        return (torch.randn(size) * scale).to(device, dtype)

    return (
        random(tokens, n),
        random(b, m // b, r, scale=r**-0.5),
        random(b, b, r),
        random(b, n // b, r, scale=n**-0.5),
        random(m),
    )


def oracle(x, u, s, v, bias=None):
    y = x.double() @ to_dense(u.double(), s.double(), v.double()).T
    return y if bias is None else y + bias.double()


def assert_close(value, exact, dtype):
    assert value.shape == exact.shape
    assert value.dtype == dtype
    assert value.is_contiguous()
    if exact.any():
        error = ((value.double() - exact).norm() / exact.norm()).item()
        assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"  # NaN fails
    else:
        assert not value.any()


def check_forward(shape, tokens, dtype, device):
    x, u, s, v, bias = case(shape, tokens, dtype, device)
    assert_close(kernel.forward(x, u, s, v), oracle(x, u, s, v), dtype)
    assert_close(kernel.forward(x, u, s, v, bias=bias), oracle(x, u, s, v, bias), dtype)


def check_once(shape, tokens, dtype, device):
    x, u, s, v, bias = case(shape, tokens, dtype, device)
    assert_close(kernel.forward(x, u, s, v, bias=bias), oracle(x, u, s, v, bias), dtype)


def check_backward(shape, tokens, dtype, device):
    tensors = case(shape, tokens, dtype, device)[:4]
    grad = torch.randn(tokens, shape[0]).to(device, dtype)
    exact = [t.double().requires_grad_() for t in tensors]
    oracle(*exact).backward(grad.double())
    found = kernel.backward(grad, *tensors, (True, True, True, True))
    for value, leaf in zip(found, exact, strict=True):
        assert_close(value, leaf.grad, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [0, 1, 7, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_dense(shape, tokens, dtype, device):
    check_forward(shape, tokens, dtype, device)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_dense(shape, tokens, dtype, device):
    check_backward(shape, tokens, dtype, device)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("shape", [TILED, SHAPES[4]])
def test_every_decode_candidate(shape, tokens, device, choose):
    b = shape[2]
    for groups in kernel._group_counts(tokens):
        choose({"decode": groups})
        with suppress(OutOfResources):  # the first config of few groups has no room
            check_once(shape, tokens, torch.float32, device)
    down, up = kernel._down_configs(b, tokens), kernel._up_configs(tokens)
    chosen = [{"down": config} for config in down] + [{"up": config} for config in up]
    for configs in chosen:
        choose({"decode": 2, "down": down[0], "up": up[0]} | configs)
        # Not every one has room on every device: then tuning leaves it out.
        with suppress(OutOfResources):
            check_once(shape, tokens, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [TILED, WIDE])
def test_every_coupling(shape, dtype, device, choose):
    for config in kernel._couple_configs(shape[2]):
        choose({"couple": config})
        check_once(shape, 150, dtype, device)


@pytest.mark.parametrize("shape", [TILED, WIDE])
def test_every_gradient_candidate(shape, device, choose):
    for config in kernel.GRADIENT_CONFIGS:
        choose({"couple_gradient": config})
        check_backward(shape, 150, torch.float32, device)


@pytest.mark.parametrize("shape", [(64, 128, 64, 3)])
def test_as_many_blocks_as_there_are_registers(shape, device):
    check_forward(shape, 5, torch.float32, device)
    check_backward(shape, 5, torch.float32, device)


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_strided_inputs(tokens, device):
    x, u, s, v, _ = case(PLAIN, tokens, torch.float32, device)
    wide = torch.randn(tokens, 2 * x.shape[1], device=device)
    grad = torch.randn(PLAIN[0], device=device).expand(tokens, -1)
    for strided in (wide[:, 5 : 5 + x.shape[1]], wide[:, ::2], x[:1].expand(tokens, -1)):
        assert_close(kernel.forward(strided, u, s, v), oracle(strided, u, s, v), x.dtype)
        dx, _, _, dv = kernel.backward(grad, strided, u, s, v, (True, False, False, True))
        exact = [t.double().requires_grad_() for t in (strided, v)]
        oracle(exact[0], u, s, exact[1]).backward(grad.double())
        assert_close(dx, exact[0].grad, x.dtype)
        assert_close(dv, exact[1].grad, x.dtype)


def test_a_bias_may_be_a_view(device):
    x, u, s, v, bias = case(PLAIN, 9, torch.float32, device)
    wide = torch.randn(2 * len(bias), device=device)
    for strided in (wide[::2], bias[:1].expand(len(bias))):
        found = kernel.forward(x, u, s, v, bias=strided)
        assert_close(found, oracle(x, u, s, v, strided), x.dtype)


def test_choices_are_not_shared_between_kernels_of_other_alignment():
    """Triton compiles another one where 16 divides a size; a config may have no room in it."""

    def of(r: int, x: torch.Tensor) -> object:
        u, v = torch.empty(4, 16, r), torch.empty(4, 16, r)
        return kernel._case(x, u, v, False)

    x = torch.empty(33, 80)
    assert of(264, x[:, :64]) != of(272, x[:, :64])
    assert of(272, x[:, :64]) == of(288, x[:, :64])
    assert of(272, x[:, :64]) != of(272, x[:, 1:65])
    assert of(272, torch.empty(33, 72)[:, :64]) != of(272, x[:, :64])


def test_only_wanted_gradients_and_the_same_each_time(device):
    tensors = case(PLAIN, 33, torch.float32, device)[:4]
    grad = torch.randn(33, PLAIN[0], device=device)
    full = kernel.backward(grad, *tensors, (True, True, True, True))
    for wanted in range(16):
        needs = tuple(bool(wanted >> bit & 1) for bit in range(4))
        found = kernel.backward(grad, *tensors, needs)
        for value, need, other in zip(found, needs, full, strict=True):
            assert (value is not None) == need
            assert value is None or torch.equal(value, other)


def test_parameters_that_require_gradients(device):
    x, u, s, v, _ = case(PLAIN, 70, torch.float32, device)
    y = kernel.forward(x, *(t.requires_grad_() for t in (u, s, v)))
    assert not y.requires_grad


def test_unsupported_dtypes_are_refused(device):
    x, u, s, v, _ = case(PLAIN, 3, torch.float32, device)
    with pytest.raises(TypeError, match="expected one for all"):
        kernel.forward(x.half(), u, s, v)
    with pytest.raises(TypeError, match="float64"):
        kernel.forward(*(t.double() for t in (x, u, s, v)))


@pytest.mark.parametrize("stage", ["down", "couple", "up", "couple_gradient"])
def test_a_wrong_kernel_would_be_noticed(stage, device, choose, monkeypatch):
    """The parity checks can fail: a kernel that forgets the last block, or its sum, is caught."""
    real = getattr(k, stage)

    def wrong(*arguments):
        first, second, *others = arguments
        copy = torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device=device)
        copy.copy_(first)[(-1,) * (first.dim() - 1)][-5:] = 0  # in the last block, row or column
        return real(copy, second, *others)

    monkeypatch.setattr(k, stage, wrong)
    choose({"decode": 1})
    tokens = 70 if stage == "couple" else 7
    check = check_backward if stage == "couple_gradient" else check_forward
    with pytest.raises(AssertionError, match="relative error"):
        check(PLAIN, tokens, torch.float32, device)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """The real pick, with a made-up clock: a candidate takes its own value in milliseconds."""
    monkeypatch.undo()
    path = tmp_path / "cache" / "choices.json"
    monkeypatch.setattr(tune, "cache_path", lambda device: path)
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(
        tune, "_milliseconds", lambda run, candidates, device, nested: [run(c) for c in candidates]
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return path


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def never(candidate):
    raise AssertionError("measured again")


def test_the_fastest_is_chosen_and_kept(table):
    assert tune.pick("a", (1,), [3, 1, 2], float, CUDA) == 1
    assert tune.pick("a", (1,), [3, 1, 2], never, CUDA) == 1
    tune._chosen.clear()  # a new process
    assert tune.pick("a", (1,), [3, 1, 2], never, CUDA) == 1
    assert tune.pick("a", (2,), [3, 2], float, CUDA) == 2
    assert len(json.loads(table.read_text())) == 2


def test_a_table_that_cannot_be_written_is_kept_in_memory(table):
    table.parent.write_text("in the way of the folder")
    assert tune.pick("a", (1,), [3, 1, 2], float, CUDA) == 1
    assert tune.pick("a", (1,), [3, 1, 2], never, CUDA) == 1


@pytest.mark.parametrize("damage", ["", "[1]", '{"a": ', "\xff", "{\"('a', (1,))\": 9}"])
def test_a_damaged_or_outdated_table_is_measured_again(table, damage):
    table.parent.mkdir()
    table.write_text(damage, encoding="latin-1")
    assert tune.pick("a", (1,), [3, 1], float, CUDA) == 1
    assert json.loads(table.read_text()) == {"('a', (1,))": 1}


def test_nothing_is_measured_without_cuda_or_during_capture(table, monkeypatch):
    assert tune.pick("a", (1,), [3, 1], never, CPU) == 3
    assert tune.pick("a", (1,), [3], never, CUDA) == 3
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tune.pick("a", (1,), [3, 1], never, CUDA) == 3
    assert tune.pick("a", (1,), [3, 1], never, CUDA, capturing=0) == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tune.pick("a", (1,), [3, 1], float, CUDA) == 1  # the first was not remembered
    tune._chosen.clear()  # another process finds the choice on disk, also while it captures
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tune.pick("a", (1,), [3, 1], never, CUDA) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_candidates_that_fail_are_left_out(nested):
    threads = []

    def run(candidate):
        threads.append(threading.get_ident())
        if candidate == 2:
            raise OutOfResources(2, 1, "shared memory")

    assert tune._usable(run, [1, 2, 3], nested, nullcontext) == [True, False, True]
    assert (set(threads) == {threading.get_ident()}) == nested
    with pytest.raises(OutOfResources):
        tune._usable(run, [2, 2], nested, nullcontext)


def test_the_table_is_named_by_device_and_kernel_source(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tune.cache_path.cache_clear()
    path = tune.cache_path(CPU)
    assert path.parent == tmp_path / "blast-search"
    assert path.name.startswith("triton-")
    tune.cache_path.cache_clear()
    monkeypatch.setattr(tune, "label", lambda name: f"{name}-other source")
    assert tune.cache_path(CPU) != path
    tune.cache_path.cache_clear()


@pytest.mark.skipif(not INTERPRETED, reason="the same with real timings is a test below")
@pytest.mark.parametrize("tokens", [1, 12, 70])
def test_tuning_tries_every_candidate_of_a_call(tokens, table, monkeypatch):
    """Nested choices, as on CUDA, with the wall clock."""
    tried = []

    def clock(run, candidates, device, nested):
        times = []
        for candidate in candidates:
            start = time.perf_counter()
            run(candidate)
            tried.append(candidate)
            times.append(time.perf_counter() - start)
        return times

    real = tune.pick
    monkeypatch.setattr(tune, "_milliseconds", clock)
    monkeypatch.setattr(
        tune, "pick", lambda *arguments, **more: real(*arguments[:-1], CUDA, **more)
    )
    for _ in range(2):  # the second time from the file
        check_once(SHAPES[4], tokens, torch.float32, "cpu")
        tune._chosen.clear()
    configs = [] if tokens == 1 else kernel._couple_configs(8)
    if tokens <= kernel.DECODE_TOKENS:
        configs += [*kernel._down_configs(8, tokens), *kernel._up_configs(tokens)]
    assert all(config in tried for config in configs)
    count = len(tried)
    check_once(SHAPES[4], tokens, torch.float32, "cpu")
    assert len(tried) == count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 16, 64, 300])
def test_tuned_and_captured_in_a_graph(tokens, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tune.cache_path.cache_clear()
    dtype = torch.bfloat16
    x, u, s, v, bias = case((512, 1024, 4, 96), tokens, dtype, "cuda")
    kernel.forward(x, u, s, v, bias=bias)  # tunes and compiles
    assert list((tmp_path / "blast-search").glob("triton-*.json"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.forward(x, u, s, v, bias=bias)
    x.copy_(torch.randn_like(x))
    y.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert_close(y, oracle(x, u, s, v, bias), dtype)
    tune.cache_path.cache_clear()
