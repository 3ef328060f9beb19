"""Grams: of every call of a layer, shared by layers that always read the same."""

from __future__ import annotations

import pytest
import torch
from test_layers import found
from torch import nn

from blast_search import find_layers
from blast_search.calibrate import collect_grams
from blast_search.errors import IncompatibleInputError


def test_grams_are_the_mean_outer_product_and_shared():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, attention_mask=None):
            return self.o(self.q(x) * self.k(x)) + 0

    model = Shared().eval()
    batches = [{"x": torch.randn(2, 3, 6), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}]
    layers, _ = found(model, batches[0])
    grams = collect_grams(model, layers, batches)
    rows = batches[0]["x"][batches[0]["attention_mask"].bool()]
    torch.testing.assert_close(grams["q"], rows.T @ rows / 3)
    assert grams["q"] is grams["k"]
    assert grams["o"] is not grams["q"]


class Several(nn.Module):
    """Four layers that begin alike, and a function that calls them."""

    def __init__(self, body) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.body = body

    def forward(self, x, z):
        return self.body(self, x.clone(), z)


def gram(*inputs: torch.Tensor) -> torch.Tensor:
    rows = torch.cat(inputs)
    return rows.T @ rows / len(rows)


def grams_of(body, *batches) -> tuple[dict[str, torch.Tensor], Several]:
    model = Several(body)
    return collect_grams(model, find_layers(model), batches), model


def test_an_input_changed_in_place_is_another_input():
    def body(m, x, z):
        x += m.a(x)
        return m.b(x) + m.c(x)

    x, z = torch.randn(5, 4), torch.randn(5, 4)
    grams, model = grams_of(body, (x, z))
    changed = x + model.a(x).detach()
    torch.testing.assert_close(grams["a"], gram(x))
    torch.testing.assert_close(grams["b"], gram(changed))
    assert grams["b"] is grams["c"]
    with torch.inference_mode():  # where PyTorch counts no changes
        again, model = grams_of(body, (x.clone(), z))
        torch.testing.assert_close(again["b"], gram(x + model.a(x)))


def test_every_call_counts_and_only_equal_calls_share():
    def body(m, x, z):
        m.c(x), m.d(x), m.c(z), m.d(z)
        return m.a(x) + m.b(x)

    x, z = torch.randn(5, 4), torch.randn(3, 4)
    grams, _ = grams_of(body, (x, z), (2 * x, z))
    torch.testing.assert_close(grams["a"], gram(x, 2 * x))
    torch.testing.assert_close(grams["c"], gram(x, z, 2 * x, z))
    assert grams["a"] is grams["b"]
    assert grams["c"] is grams["d"]


def test_layers_that_part_in_a_later_batch_do_not_share():
    def body(m, x, z):
        if len(x) == 5:
            return m.a(x) + m.b(x)
        return m.a(x) + m.b(z) + m.c(x) + m.d(x)

    x, z, short = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3, 4)
    grams, _ = grams_of(body, (x, z), (short, z))
    torch.testing.assert_close(grams["a"], gram(x, short))
    torch.testing.assert_close(grams["b"], gram(x, z))
    torch.testing.assert_close(grams["c"], gram(short))  # its leader would bring the first batch
    assert grams["c"] is grams["d"]


def test_calibration_with_nan_names_the_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    layers, _ = found(model, torch.randn(2, 4))
    with pytest.raises(IncompatibleInputError, match=r"layer 0: its input"):
        collect_grams(model, layers, [torch.full((2, 4), float("nan"))])
    with pytest.raises(IncompatibleInputError, match="gave no batch"):
        collect_grams(model, layers, [])


def test_layers_called_by_keyword_have_grams():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(input=self.a(input=x))

    model, x = Keyword(), torch.randn(5, 4)
    layers, _ = found(model, x)
    torch.testing.assert_close(collect_grams(model, layers, [x])["a"], x.T @ x / 5)
    utils = pytest.importorskip("transformers.pytorch_utils")
    model.a = utils.Conv1D(6, 4)  # which calls its input x
    model.forward = lambda x: model.b(input=model.a(x=x))
    torch.testing.assert_close(collect_grams(model, layers, [x])["a"], x.T @ x / 5)
