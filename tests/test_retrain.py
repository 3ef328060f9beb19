"""Retraining and evaluation: any dtype and device of the model, any kind of task."""

from __future__ import annotations

import copy
from collections import namedtuple
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import Net, ToyTask

import blast_search as bs
from blast_search import models, recovery
from blast_search.batches import anywhere, to_device
from blast_search.engine import Contender
from blast_search.errors import IncompatibleInputError, UsageError
from blast_search.evaluate import count_macs, evaluate
from blast_search.judge import BROKEN
from blast_search.layers import Workload
from blast_search.progress import Reporter
from blast_search.retrain import retrain, trainable_parameters, tried_loss
from blast_search.runfolder import RunFolder
from blast_search.space import DENSE, Candidate

Pair = namedtuple("Pair", "x y")


def compressed(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    teacher = ToyTask().model().to(dtype)
    model = ToyTask().model()
    for block in model.blocks:
        block.fc1 = bs.BlastLinear.from_linear(block.fc1, 2, 16)
    return model.to(dtype), teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_steps_add_up_in_any_dtype(dtype: torch.dtype):
    model, teacher = compressed(dtype)
    before = [p.detach().clone() for p in trainable_parameters(model)]
    losses = retrain(ToyTask(), model, teacher, 30, learning_rate=3e-4)
    assert {p.dtype for p in (*model.parameters(), *teacher.parameters())} == {dtype}
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    changed = [
        not torch.equal(p, q) for p, q in zip(trainable_parameters(model), before, strict=True)
    ]
    assert all(changed)


def test_flags_and_modes_come_back():
    model, teacher = compressed(torch.float32)
    teacher.train()
    model.head.weight.requires_grad_(False)
    retrain(ToyTask(), model, teacher, 1)
    assert all(p.requires_grad for p in teacher.parameters())
    assert all(m.training for m in teacher.modules())
    assert not model.head.weight.requires_grad
    assert all(p.requires_grad for p in model.blocks.parameters())


def test_equal_seeds_give_equal_losses_also_where_the_task_draws(monkeypatch):
    def masked(self: ToyTask, model: nn.Module, batch: Tensor, teacher: nn.Module) -> Tensor:
        batch = batch * (torch.rand(batch.shape) > 0.5)
        return (model(batch) - teacher(batch).detach()).square().mean()

    monkeypatch.setattr(ToyTask, "loss", masked)
    torch.manual_seed(1)
    teacher, model = Net(), ToyTask().model
    losses = [retrain(ToyTask(), model(), teacher, 2, seed) for seed in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]


def test_biases_are_trained_whatever_pytorch_calls_them():
    model = nn.ModuleDict({
        "rnn": nn.LSTM(4, 4), "attention": nn.MultiheadAttention(4, 2), "norm": nn.LayerNorm(4),
        "table": nn.ParameterDict({"relative_position_bias_table": torch.zeros(3)}),
    })  # fmt: skip
    model["norm"].register_parameter("steps", nn.Parameter(torch.tensor(3), requires_grad=False))
    chosen = {id(p) for p in trainable_parameters(model)}
    assert {name for name, p in model.named_parameters() if id(p) in chosen} == {
        "rnn.bias_ih_l0", "rnn.bias_hh_l0", "attention.in_proj_bias", "attention.out_proj.bias",
        "norm.weight", "norm.bias",
    }  # fmt: skip


def test_a_learning_rate_of_zero_moves_nothing():
    model, teacher = compressed(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    retrain(ToyTask(), model, teacher, 2, learning_rate=0.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_layers_that_the_gradient_does_not_reach_are_told():
    class Blind(nn.Module):
        def __init__(self, net: nn.Module, first: int) -> None:
            super().__init__()
            self.net, self.first = net, first

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for block in self.net.blocks[: self.first]:
                    x = block(x)
            for block in self.net.blocks[self.first :]:
                x = block(x)
            return self.net.head(x.mean(1))

    model, teacher = compressed(torch.float32)
    said: list[str] = []
    report = Reporter(0)
    report.say = said.append  # type: ignore[method-assign]
    retrain(ToyTask(), Blind(model, 2), Blind(teacher, 2), 1, report=report)
    assert any("reaches 1 of 3 replaced layers" in text for text in said)
    with pytest.raises(IncompatibleInputError, match="reaches 0 of 3 replaced layers"):
        retrain(ToyTask(), Blind(model, 3), Blind(teacher, 3), 1)
    said.clear()
    retrain(ToyTask(), model, teacher, 1, report=report)
    assert not any("reaches" in text for text in said)


def test_training_data_that_ends_is_read_again(monkeypatch):
    batches = ToyTask.train_batches
    seeds: list[int] = []

    def two(self: ToyTask, seed: int):
        seeds.append(seed)
        return islice(batches(self, seed), 2)

    monkeypatch.setattr(ToyTask, "train_batches", two)
    assert len(retrain(ToyTask(), *compressed(torch.float32), 5, 7)) == 5
    assert seeds == [7, 8, 9]
    monkeypatch.setattr(ToyTask, "train_batches", lambda self, seed: iter(()))
    with pytest.raises(IncompatibleInputError, match=r"gave no batch"):
        retrain(ToyTask(), *compressed(torch.float32), 5)
    with pytest.raises(UsageError, match="steps are -1"):
        retrain(ToyTask(), *compressed(torch.float32), -1)


def test_a_loss_that_is_never_finite_is_an_error(monkeypatch):
    monkeypatch.setattr(ToyTask, "loss", lambda self, m, b, t: m(b).sum() * float("nan"))
    model, teacher = compressed(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(IncompatibleInputError, match="not finite"):
        retrain(ToyTask(), model, teacher, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_task_need_not_know_the_models_dtype(dtype: torch.dtype):
    task = ToyTask()  # calls model(x) with float32 data, and compares with a float32 model
    assert evaluate(task, task.model().to(dtype)) > 0.9


def test_outputs_come_back_as_the_inputs_were():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, mask=None):
            return {"pair": Pair(self.fc(x), torch.arange(3)), "name": "two"}

    model, x = Two().to(torch.bfloat16), torch.randn(2, 4)
    with anywhere(model):
        output = model(x, mask=torch.ones(2))
        assert model(x.bfloat16())["pair"].x.dtype is torch.bfloat16
    assert output["pair"].x.dtype is torch.float32
    assert output["pair"].y.dtype is torch.int64
    assert output["name"] == "two"
    with pytest.raises(RuntimeError):  # and not beyond
        model(x)
    moved = to_device(Pair(x, torch.arange(2)), model)
    assert isinstance(moved, Pair)
    assert (moved.x.dtype, moved.y.dtype) == (torch.bfloat16, torch.int64)


def test_fused_transformer_layers_are_counted():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    layers = bs.find_layers(layer, [Workload("w", x)])
    linear = sum(ly.macs(DENSE) for ly in layers)
    assert linear == 10 * 2 * 32 * 64
    # Projections (4 n^2), and scores and values (2 t n per token).
    assert count_macs(layer, [Workload("w", x)]) == linear + 10 * (4 * 32 * 32 + 2 * 5 * 32)


class Contenders(models.Models):
    """What Models needs of a run to retrain one contender and judge it."""

    def __init__(self, folder: Path) -> None:
        self.model, dense = compressed(torch.float32)
        self.prepared = SimpleNamespace(task=ToyTask(), model=dense)  # type: ignore[assignment]
        self.settings = SimpleNamespace(time_limit=None)  # type: ignore[assignment]
        self.records, self.report = RunFolder(folder), Reporter(0)
        self.folder = folder

    def build(self, contender, plan=None) -> nn.Module:
        return copy.deepcopy(self.model)


@pytest.fixture
def rates(monkeypatch) -> list[float]:
    """Learning rates of the last retrainings, beside a metric by which any harm shows."""
    monkeypatch.setattr(  # minus the distance to the dense model
        ToyTask,
        "evaluate",
        lambda self, m: -float((m(self.data[64:]) - self.model()(self.data[64:])).norm()),
    )
    seen: list[float] = []

    def noted(task, model, teacher, steps, seed, rate, *rest, **more):
        seen.append(rate)
        return retrain(task, model, teacher, steps, seed, rate, *rest, **more)

    monkeypatch.setattr(recovery, "retrain", noted)
    return seen


CONTENDER = Contender("some", {"blocks.0.fc1": Candidate(2, 16)}, None, 0.5, True)  # type: ignore[arg-type]


@pytest.mark.parametrize(("limit", "count"), [(None, 2), (5.0, 1)])
def test_retraining_that_harms_is_tried_at_a_lower_rate_if_there_is_time(
    tmp_path: Path, monkeypatch, rates: list[float], limit: float | None, count: int
):
    monkeypatch.setattr(ToyTask, "learning_rate", 0.3, raising=False)
    monkeypatch.setattr(models, "SLOWER", 1000)
    some = Contenders(tmp_path)
    some.settings.time_limit = limit  # type: ignore[misc]
    model, value = some.trained("some", CONTENDER, 20, 0)  # type: ignore[arg-type]
    assert rates == [0.3, 3e-4][:count]
    before = evaluate(ToyTask(), some.model)
    assert value == evaluate(ToyTask(), model)
    assert value > before if limit is None else value == before


def test_retraining_that_harms_at_any_rate_is_not_kept(tmp_path: Path, monkeypatch, rates):
    monkeypatch.setattr(ToyTask, "learning_rate", 10.0, raising=False)
    some = Contenders(tmp_path)
    model, value = some.trained("some", CONTENDER, 2, 0)  # type: ignore[arg-type]
    assert rates == [10.0, 2.5]
    assert value == evaluate(ToyTask(), some.model) == evaluate(ToyTask(), model)
    monkeypatch.setattr(ToyTask, "loss", lambda self, m, b, t: m(b).sum() * float("nan"))
    model, value = some.trained("some", CONTENDER, 2, 0)  # type: ignore[arg-type]
    assert value == evaluate(ToyTask(), model)  # nor one that fails


def test_a_metric_that_is_not_finite_loses(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(ToyTask, "evaluate", lambda self, model: float("nan"))
    assert Contenders(tmp_path).metric(CONTENDER) == -BROKEN  # type: ignore[arg-type]


class Losing(ToyTask):
    """The toy task with another loss."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss  # type: ignore[method-assign]


@torch.no_grad()
def without_gradients(model, batch, teacher):
    return model(batch).square().mean()


LOSSES = {
    "a float": lambda model, batch, teacher: model(batch).mean().item(),
    r"shape \[8, 10\], expected": lambda model, batch, teacher: model(batch),
    r"shape \[\] without a gradient": without_gradients,
}


@pytest.mark.parametrize("got", LOSSES)
def test_a_loss_that_cannot_be_descended_is_refused(got: str):
    task = Losing(LOSSES[got])
    with pytest.raises(IncompatibleInputError, match=f"loss\\(\\) returned .*{got}"):
        retrain(task, task.model(), task.model(), 1)
    with pytest.raises(IncompatibleInputError, match=f"{got}.*--retrain-steps 0"):
        tried_loss(task, task.model())


def test_the_loss_is_tried_before_a_search():
    task, state = ToyTask(), torch.random.get_rng_state()
    model = task.model().to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tried_loss(task, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)

    def freezing(model: nn.Module, batch: torch.Tensor, teacher: nn.Module) -> torch.Tensor:
        teacher.requires_grad_(False)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return task.loss(model, batch, teacher)

    tried_loss(Losing(freezing), model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(
        IncompatibleInputError, match=r"loss\(\) of the first .* KeyError: 'labels'"
    ):
        tried_loss(Losing(lambda model, batch, teacher: {}["labels"]), model)
    task.train_batches = lambda seed: iter([])  # type: ignore[method-assign]
    with pytest.raises(IncompatibleInputError, match=r"gave no batch.*--retrain-steps 0"):
        tried_loss(task, model)
    task.train_batches = lambda: iter([])  # type: ignore[method-assign,assignment]
    tried_loss(task, model, steps=0)
    with pytest.raises(IncompatibleInputError, match=r"train_batches\(\) failed: TypeError"):
        tried_loss(task, model)


@pytest.mark.parametrize("value", [None, {"accuracy": 1.0}, torch.ones(2)])
def test_a_metric_that_is_no_number_is_refused(value: Any):
    task = ToyTask()
    task.evaluate = lambda model: value  # type: ignore[method-assign]
    with pytest.raises(IncompatibleInputError, match=r"evaluate\(\) returned a"):
        evaluate(task, task.model())
