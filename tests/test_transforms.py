"""BLAST layers under PyTorch's function transforms, tracers, autocast and the meta device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from blast_search import BlastLinear

# PyTorch's own forward-mode AD scripts some of its formulas.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture(params=["b = 1", "b = 1 in place of another", "b = 4"])
def layer(request) -> BlastLinear:
    if request.param == "b = 1 in place of another":  # its couplings are a buffer
        return BlastLinear.empty_like(nn.Linear(16, 8), 1, 3)
    return BlastLinear(16, 8, 4 if request.param == "b = 4" else 1, 3)


def dense(layer: BlastLinear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.to_dense(), layer.bias)


def test_function_transforms_see_through_a_layer(layer: BlastLinear):
    x, t, parameters = torch.randn(5, 16), torch.randn(5, 16), dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    wanted = torch.autograd.grad(dense(layer, x).square().sum(), list(parameters.values()))
    for value, exact in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(value, exact)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)  # gradients by sample
    torch.testing.assert_close(each["U"].sum(0), found["U"])
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in parameters.items()}
    models = torch.func.vmap(loss, (0, None))(stacked, x)  # an ensemble
    torch.testing.assert_close(models[0], loss(parameters, x))
    y, tangent = torch.func.jvp(layer, (x,), (t,))
    torch.testing.assert_close(y, dense(layer, x))
    torch.testing.assert_close(tangent, t @ layer.to_dense().T)
    curvature = torch.func.hessian(lambda x: layer(x).square().sum())(x[0])
    torch.testing.assert_close(curvature, 2 * layer.to_dense().T @ layer.to_dense())


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_keeps_its_tangents(layer: BlastLinear, grad: bool):
    x, t = torch.randn(5, 16), torch.randn(5, 16)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t))).tangent
    torch.testing.assert_close(tangent, t @ layer.to_dense().T)


def test_symbolic_traces_hold_a_layer_as_one_call(layer: BlastLinear):
    model, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(2, 3, 16)
    traced = torch.fx.symbolic_trace(model)
    assert [n.name for n in traced.graph.nodes if n.op == "call_function"] == ["blast_matmul"]
    torch.testing.assert_close(copy.deepcopy(traced)(x), model(x))


def test_autocast_leaves_float64_as_it_is(layer: BlastLinear):
    x = torch.randn(3, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype is torch.bfloat16
        y = layer.double()(x)
        assert y.dtype is nn.Linear(16, 8).double()(x).dtype is torch.float64
    torch.testing.assert_close(y, dense(layer, x))


def test_layers_run_on_the_meta_device(layer: BlastLinear):
    layer = layer.to("meta")
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            y = layer(torch.empty(2, 3, 16, device="meta"))
            assert (y.shape, y.device.type) == ((2, 3, 8), "meta")
