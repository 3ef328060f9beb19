"""PyTorch's fused paths: out of the way of hooks, comparisons and gradients, then back again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toy import ToyTask

from blast_search.calibrate import collect_grams
from blast_search.errors import IncompatibleInputError
from blast_search.fitting import Fitter
from blast_search.fused import differentiable
from blast_search.judge import Judge
from blast_search.layers import Workload, inventory
from blast_search.outputs import divergences, reference_outputs
from blast_search.retrain import retrain
from blast_search.space import DENSE, LayerSpec, SearchSpace

PADDING = torch.tensor([[False, False, False], [False, False, True]])


@pytest.fixture
def encoder() -> nn.Module:
    """It computes with nested tensors where a padding mask is given, as PyTorch's default is."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {"src": torch.randn(2, 3, 8), "src_key_padding_mask": PADDING}


def layers_of(model: nn.Module, batch: object) -> list[LayerSpec]:
    return inventory(model, [Workload("w", batch)], SearchSpace(output_head=True))[0]


def test_padded_encoders_can_be_traced_and_calibrated(encoder, batch):
    layers = layers_of(encoder, batch)
    assert [layer.name.rpartition(".")[2] for layer in layers] == ["linear1", "linear2"] * 2
    assert all(layer.calls[0].tokens == 6 for layer in layers)
    grams = collect_grams(encoder, layers, [batch])
    assert {gram.shape for gram in grams.values()} == {(8, 8), (16, 16)}
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_padded_positions_are_computed_alike_in_dense_and_other_models(encoder, batch):
    """The nested path leaves zeros there, which would look like an error of every plan."""
    with torch.no_grad():
        assert not encoder(**batch)[PADDING].any()
    layers = layers_of(encoder, batch)
    judge = Judge(encoder, layers, Fitter(encoder, layers, {}, {}), [batch])
    (wanted,) = judge.wanted()
    assert bool(wanted[""][PADDING].all())
    assert torch.equal(wanted[""], reference_outputs(encoder, [batch])[0][""])
    assert list(divergences(encoder, [batch], [wanted])) == [0]
    assert judge.gradients({layer.name: DENSE for layer in layers}, [0]).keys() == {
        layer.name for layer in layers
    }
    assert torch.backends.mha.get_fastpath_enabled()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rnn, self.seen = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True), []

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(torch.backends.cudnn.enabled)
        return self.rnn(self.fc(x))[0]


def test_cudnn_is_off_where_gradients_pass_a_recurrent_layer_in_eval_mode(monkeypatch):
    """Its backward pass refuses eval mode; the native one does not."""
    x, model = torch.randn(2, 3, 4), Recurrent().eval()
    monkeypatch.setattr(ToyTask, "train_batches", lambda self, seed: iter([x]))
    retrain(ToyTask(), model, Recurrent(), 1)
    layers = layers_of(model, x)
    Judge(model, layers, Fitter(model, layers, {}, {}), [x]).gradients({"fc": DENSE}, [0])
    assert model.seen == [False, False]
    assert torch.backends.cudnn.enabled
    with differentiable(ToyTask().model()):  # without such layers it stays
        assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("before", [True, False])
def test_switches_come_back_also_after_an_error(encoder, before: bool):
    torch.backends.mha.set_fastpath_enabled(before)
    try:
        with pytest.raises(IncompatibleInputError):
            reference_outputs(encoder, [None])
        assert torch.backends.mha.get_fastpath_enabled() is before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
