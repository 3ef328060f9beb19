"""How models are called and judged: modes, what an output is about, how far two are apart."""

from __future__ import annotations

import random
import weakref
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_layers import found
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from toy import ToyTask

from blast_search.batches import anywhere, to_device
from blast_search.calibrate import collect_grams
from blast_search.errors import IncompatibleInputError
from blast_search.evaluate import evaluate
from blast_search.layers import Workload, find_layers, inventory
from blast_search.model_latency import time_variants
from blast_search.outputs import divergence, output_tensors, reference_outputs, token_mask
from blast_search.retrain import retrain
from blast_search.space import SearchSpace


def test_modes_inside_a_model_come_back():
    class Frozen(ToyTask):
        def evaluate(self, model):
            assert not any(m.training for m in model.modules())
            return 0.0

    model, teacher = Frozen().model(), Frozen().model()
    x = ToyTask().workload()
    for whole in (model, teacher):
        whole.train()
        whole.blocks[1].norm.eval()  # as a frozen BatchNorm
        whole.blocks[0].fc1.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    layers, _ = inventory(model, [Workload("w", x)], SearchSpace())
    assert {name: m.training for name, m in model.named_modules()} == modes
    collect_grams(model, layers, [x])
    evaluate(Frozen(), model)
    time_variants(model, layers, {"same": {}}, [Workload("w", x)], 0.05, 2, 2)
    retrain(ToyTask(), model, teacher, 1)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: m.training for name, m in teacher.named_modules()} == modes


class Output:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def test_divergence():
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert divergence(a, a, a) == 0
    assert divergence(2 * a, a, a) == pytest.approx(1.0)
    kl = divergence(Output(a), Output(b), None)
    p, q = b.softmax(-1), a.softmax(-1)
    assert kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    mask = {"attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]])}
    c = b.clone()
    c[0, 2], c[1] = 99, 99
    assert divergence(c, b, mask) == 0  # padding does not count
    spans = {"start_logits": b[..., 0]}, {"start_logits": c[..., 0]}
    assert divergence(*spans, mask) == 0 < divergence(*spans, None)
    with pytest.raises(IncompatibleInputError, match="without a floating tensor"):
        output_tensors("text")


def test_one_logit_alone_is_no_distribution():
    """Regression heads return one; its softmax is 1 whatever it is, and all plans looked free."""
    a, b = torch.randn(4, 1), torch.randn(4, 1)
    assert divergence(Output(a), Output(b), None) == divergence(a, b, None) > 0
    assert divergence(Output(a), Output(a), None) == 0
    a, b = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)  # of each pixel
    assert divergence(Output(a), Output(b), None) == divergence(a, b, None)


def test_the_classes_of_an_image_are_in_its_second_dimension():
    a, b = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    rows = [t.movedim(1, -1).reshape(-1, 5) for t in (a, b)]
    wanted = divergence(Output(rows[0]), Output(rows[1]), None)
    assert divergence(Output(a), Output(b), None) == pytest.approx(float(wanted))


def test_inputs_get_the_dtype_of_floating_parameters_only():
    def model(*parameters: torch.Tensor) -> nn.Module:
        return nn.ParameterList(nn.Parameter(p, requires_grad=False) for p in parameters)

    ids, phases, half = torch.arange(3), torch.zeros(2).cfloat(), torch.ones(2).half()
    batch = {"x": torch.tensor([0.5, 1.5]), "ids": ids, "phases": phases}
    for parameters, dtype in (((ids, phases, half), torch.half), ((ids, phases), torch.float32)):
        moved = to_device(batch, model(*parameters))
        assert moved["x"].dtype is dtype
        assert torch.equal(moved["x"], batch["x"].to(dtype))
        assert moved["ids"].dtype is torch.int64
        assert moved["phases"].dtype is torch.complex64


def test_packed_sequences_move_with_their_sizes_left_on_the_cpu():
    packed = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    moved = to_device(packed, nn.Linear(4, 4, dtype=torch.bfloat16, device="meta"))
    assert isinstance(moved, PackedSequence)
    assert moved.data.is_meta
    assert moved.data.dtype is torch.bfloat16
    assert moved.batch_sizes.is_cpu
    rnn = nn.GRU(4, 4).bfloat16()
    with anywhere(rnn):
        output, _ = rnn(packed)
    assert isinstance(output, PackedSequence)
    assert output.data.dtype is torch.float32


def test_outputs_come_back_in_their_dtype_whatever_the_first_parameter_is():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = nn.Parameter(torch.arange(2), requires_grad=False)
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x)

    x = torch.randn(3, 4)
    for dtype in (torch.float32, torch.float64):
        model = Counting()
        model.fc.to(dtype)
        with anywhere(model):
            y = model(x)
        assert y.dtype is torch.float32
        torch.testing.assert_close(y, model.fc(x.to(dtype)).float())


def test_a_task_may_call_the_model_with_containers_of_other_kinds():
    """Hugging Face's `generate` hands a decoder the encoder's output, of which [0] is read."""

    class Found(OrderedDict):
        def __getitem__(self, key):
            return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, encoder_outputs, batch):
            assert batch.encodings == "kept"
            return self.fc(encoder_outputs[0])

    model, batch = Decoder(), UserDict(ids=torch.arange(3))
    batch.encodings = "kept"
    for dtype in (torch.float32, torch.float64):
        given = Found(hidden=torch.ones(2, 4, dtype=dtype))
        with anywhere(model):
            model(encoder_outputs=given, batch=batch)
        assert given["hidden"].dtype is dtype
    twin = to_device(batch, model)
    twin.pop("ids")  # as a loss may do with labels
    assert list(batch) == ["ids"]
    with_floats = UserDict(x=torch.ones(2))
    with_floats.encodings = "kept"
    moved = to_device(with_floats, model)
    assert (moved["x"].dtype, moved.encodings) == (torch.float64, "kept")
    assert with_floats["x"].dtype is torch.float32


@dataclass
class Detection:
    loss: torch.Tensor
    boxes: list[torch.Tensor]


class Heads(NamedTuple):
    logits: torch.Tensor
    boxes: torch.Tensor


def test_the_tensors_that_an_output_is_about():
    loss, ids, wanted, other = torch.tensor(2.0), torch.arange(3), torch.ones(3, 2), torch.ones(4)
    for output, tensors in (
        (wanted, {"": wanted}),
        ({"loss": loss, "pred": wanted, "more": other}, {"pred": wanted, "more": other}),
        ((loss, ids, [None, {"deep": wanted}], other), {"3": other}),
        ((loss, [None, {"deep": wanted}]), {"": wanted}),
        (Detection(loss, [wanted, other]), {"": wanted}),
        ({"loss": loss, "inner": Detection(loss, [wanted])}, {"": wanted}),
        ({"loss": loss, "ids": ids}, {"": loss}),  # a scalar is all there is
        (Output(wanted), {"logits": wanted}),
        (Heads(wanted, other), {"logits": wanted, "boxes": other}),
        ({"logits": wanted, "last_hidden_state": other}, {"logits": wanted}),
        ({"pooled": wanted, "last_hidden_state": other},) * 2,
        ({"ids": ids, "phases": ids.cfloat(), "pred": wanted}, {"pred": wanted}),
    ):
        assert output_tensors(output) == tensors
        assert output_tensors(tensors) == tensors  # what a reference keeps reads the same
    for output in ({"ids": ids}, Detection, [], None, ids, ids.cfloat()):
        with pytest.raises(IncompatibleInputError, match="without a floating tensor"):
            output_tensors(output)
    outputs = pytest.importorskip("transformers.modeling_outputs")
    masked = outputs.MaskedLMOutput(loss=loss, logits=wanted, hidden_states=(other,))
    assert output_tensors(masked) == {"logits": wanted}
    plain = outputs.BaseModelOutput(hidden_states=(wanted,))
    assert output_tensors(plain) == {"": wanted}


def test_all_heads_of_a_model_are_judged():
    a, b, c, d = (torch.randn(4, 5) for _ in range(4))
    kl, error = divergence(Output(a), Output(b), None), divergence(c, d, None)
    assert divergence(Heads(a, c), Heads(b, d), None) == pytest.approx(float(kl + error))


def test_a_head_that_is_zero_in_the_dense_model_decides_nothing():
    a, b, zero = torch.randn(4, 5), torch.randn(4, 5), torch.zeros(4, 5)
    assert divergence((a, zero + 1e-4), (b, zero), None) == divergence((a,), (b,), None) > 0


def test_outputs_of_other_sizes_are_refused():
    for sizes in ((5, 7), (1, 4)):  # the latter would be broadcast
        found, wanted = (torch.ones(n, 4) for n in sizes)
        with pytest.raises(IncompatibleInputError, match=r"dense one .*\[[74], 4\]"):
            divergence(found, wanted, None)
    with pytest.raises(IncompatibleInputError, match="must not change its size"):
        divergence((found,), (found, wanted), None)


def test_a_mask_of_the_encoder_is_none_of_the_decoder():
    mask, ids = torch.tensor([[1, 1, 0]]), torch.zeros(1, 3, dtype=torch.long)
    encoder, decoder = {"attention_mask": mask}, {"decoder_attention_mask": mask}
    longer = {"decoder_input_ids": torch.zeros(1, 5, dtype=torch.long)}
    for batch, there in (
        (encoder, True), (decoder, True), (encoder | longer, True), ({}, False), (ids, False),
        (encoder | {"decoder_input_ids": ids}, False), (encoder | decoder, False),
    ):  # fmt: skip
        assert (token_mask(batch, (1, 3, 8)) is not None) == there
        assert token_mask(batch, (1, 5, 8)) is None


def test_looking_for_layers_and_grams_holds_no_layers_inputs_and_outputs():
    """They would fill a GPU: of every linear layer of a large model at once."""
    alive: list[bool] = []

    class Forgetful(nn.Sequential):
        def forward(self, x):
            last: list[weakref.ref[torch.Tensor]] = []
            for layer in self:
                y = layer(x)
                alive.extend(tensor() is not None for tensor in last)
                last = [weakref.ref(y), weakref.ref(x)]
                x = torch.relu(y)
                del y
            return x

    model = Forgetful(*(nn.Linear(8, 8) for _ in range(4)))
    layers = find_layers(model, [Workload("w", torch.randn(3, 8))])
    assert len(layers) == 4
    collect_grams(model, layers, [torch.randn(5, 8)])
    # But for the input of the whole model, one of six in every pass, which its caller holds.
    assert len(alive) >= 2 * 6
    assert sum(alive) == len(alive) / 6


def test_the_output_head_is_found_beside_a_loss():
    class Losing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 6)

        def forward(self, x):
            y = self.b(self.a(x))
            return {"loss": y.mean(), "pred": y}

    assert found(Losing(), torch.randn(3, 8))[1] == {"b": "output head"}


def test_batches_of_which_nothing_can_be_judged_are_refused():
    """Their divergence is 0 / 0, and every plan looked broken."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x, attention_mask):
            return Output(self.fc(x))

    def batch(rows: int, real: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(5) < real).long().expand(rows, -1)
        return {"x": torch.randn(rows, 5, 4), "attention_mask": mask}

    model, good = Tagger(), batch(2, 3)
    for bad in (batch(0, 3), batch(2, 0)):
        with pytest.raises(IncompatibleInputError, match="calibration batch 1 is empty, or all"):
            reference_outputs(model, [good, bad])
    a, b, none = torch.randn(4, 5), torch.randn(4, 5), torch.ones(4, 0)
    assert divergence((a, none), (b, none), None) == divergence((a,), (b,), None) > 0


def test_a_calibration_batch_that_does_not_fit_is_named():
    good = torch.randn(2, 8)
    for bad in (torch.randn(2, 9), {"ids": good}):
        with pytest.raises(IncompatibleInputError, match="called with calibration batch 2"):
            reference_outputs(nn.Linear(8, 8), [good, good, bad])


class Flat(nn.Module):
    """Flattens its tokens, as OPT's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embed(input_ids).flatten(0, 1))


def test_padding_does_not_count_where_a_model_flattens_its_tokens():
    model, ids = Flat(), torch.arange(8).reshape(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    layers = find_layers(model, [Workload("w", batch)], SearchSpace(output_head=True))
    gram = collect_grams(model, layers, [batch])["fc"]
    real = model.embed(ids)[mask.bool()]
    torch.testing.assert_close(gram, (real.T @ real / 6).detach())
    output = model(**batch).detach()
    other = output.clone()
    other[6:] += 1  # padding
    assert divergence(other, output, batch) == 0
    other[5:] += 1
    assert divergence(other, output, batch) > 0
    pooled = torch.randn(2, 4)  # as many columns as tokens, and a row for each sentence
    assert divergence(pooled + 1, pooled, batch) > 0


def test_references_are_copies_of_what_is_judged():
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 50)
            self.register_buffer("out", torch.zeros(8, 50))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.out.copy_(self.fc(x))
            return self.out[:, -2:]

    model, x = Kept(), torch.randn(8, 4)
    (reference,) = reference_outputs(model, [x])
    wanted = {name: value.clone() for name, value in reference.items()}
    with torch.no_grad():
        model(x + 1)
    assert all(torch.equal(reference[name], value) for name, value in wanted.items())
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in reference.values())


def test_what_a_task_draws_is_the_same_at_every_evaluation():
    class Drawing(ToyTask):
        def evaluate(self, model: nn.Module) -> float:
            return random.random() + np.random.rand() + float(torch.rand(()))

    random.seed(5)
    wanted = random.random()
    random.seed(5)
    task = Drawing()
    assert evaluate(task, task.model()) == evaluate(task, task.model())
    assert random.random() == wanted
