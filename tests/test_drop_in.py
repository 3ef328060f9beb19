"""BlastLinear where users put nn.Linear: in place, compiled, cast, parametrised, pruned."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune

from blast_search import BlastLinear, factorize, kernels, product


@pytest.mark.parametrize("b", [1, 4])
@pytest.mark.parametrize("leading", [(40,), (2, 5), (3,)])
def test_what_follows_may_work_in_place(b: int, leading: tuple[int, ...]):
    layer, x = BlastLinear(32, 32, b, 8), torch.randn(*leading, 32)
    wanted = torch.autograd.grad(functional.relu(layer(x) + x).square().sum(), layer.parameters())
    y = layer(x)
    y += x
    found = torch.autograd.grad(
        functional.relu(y, inplace=True).square().sum(), layer.parameters()
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_a_fresh_process_compiles_layers_without_a_break():
    """Dynamo imports the FLOP counter, and cannot trace how operators are added to it."""
    code = """
import torch
from blast_search import BlastLinear
model = torch.nn.Sequential(BlastLinear(32, 32, 4, 8), torch.nn.ReLU(), BlastLinear(32, 32, 2, 8))
x = torch.randn(3, 32)
compiled = torch.compile(model, backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(x), model(x))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("b", [1, 4])
def test_a_backward_pass_within_autocast_has_the_gradients_of_one_outside(b: int):
    layer, x = BlastLinear(64, 64, b, 16), torch.randn(40, 64)
    wanted = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.square().sum(), layer.parameters())
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.01


class Same(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value


@pytest.mark.parametrize("b", [1, 4])
@pytest.mark.parametrize("name", ["U", "S", "V", "bias"])
def test_any_parameter_may_be_parametrised_or_pruned(b: int, name: str):
    layer, x = BlastLinear(32, 32, b, 8), torch.randn(5, 32)
    wanted = layer(x)
    parametrize.register_parametrization(layer, name, Same())
    torch.testing.assert_close(layer(x), wanted)
    parametrize.remove_parametrizations(layer, name)
    prune.l1_unstructured(layer, name, 0.5)
    value = getattr(layer, name)
    assert float((value == 0).float().mean()) == 0.5
    bias = layer.bias if layer.bias is not None else 0
    torch.testing.assert_close(layer(x), x @ layer.to_dense().T + bias)


@pytest.mark.parametrize("b", [1, 4])
def test_pruned_couplings_count_on_a_gpu_too(b: int, monkeypatch):
    """Only couplings that are a buffer of ones may be left out of the product."""
    layer = BlastLinear(32, 32, b, 8)
    prune.l1_unstructured(layer, "S", 0.5)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(kernels, "choose", lambda *_: "lowrank" if b == 1 else "torch")
    monkeypatch.setattr(product, "observed", lambda _: False)
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x), x @ layer.to_dense().T + layer.bias)


def test_factors_of_another_shape_are_not_broadcast():
    layer = BlastLinear(32, 32, 4, 8)
    before = layer.to_dense().clone()
    with pytest.raises(ValueError, match=r"\(4, 8, 1\), expected \(4, 8, 8\)"):
        layer.set_factors(factorize(torch.randn(32, 32), 4, 1))
    assert torch.equal(layer.to_dense(), before)
