"""Plans become models, both sides: chosen layers changed, everything else untouched."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_layers import Tied
from torch import nn
from toy import Net, ToyTask

import blast_search as bs
from blast_search.errors import IncompatibleInputError
from blast_search.plan import LayerPlan, Plan


def toy_plan() -> Plan:
    layers = {
        "blocks.0.fc1": LayerPlan("blast", 4, 6, 256, 1024),
        "blocks.1.fc2": LayerPlan("blast", 1, 12, 1024, 256),
        "blocks.2.fc2": LayerPlan("dense", 0, 0, 1024, 256),
    }
    return Plan(model={"name": "Net"}, layers=layers)


def test_apply_changes_the_chosen_layers_only():
    task = ToyTask()
    model, before = task.model(), task.model().state_dict()
    assert bs.apply(model, toy_plan(), task.calibration()) is model
    assert isinstance(model.blocks[0].fc1, bs.BlastLinear)
    assert (model.blocks[1].fc2.num_blocks, model.blocks[1].fc2.rank) == (1, 12)
    assert type(model.blocks[2].fc2) is nn.Linear
    for name, value in model.state_dict().items():
        if name in before:
            assert torch.equal(value, before[name]), name
    torch.testing.assert_close(model.blocks[0].fc1.bias.data, before["blocks.0.fc1.bias"])


def test_calibration_makes_better_models():
    task = ToyTask()
    x = task.data[40:60]
    with torch.no_grad():
        wanted = task.model()(x)
        blind = bs.apply(task.model(), toy_plan())(x)
        aware = bs.apply(task.model(), toy_plan(), task.calibration())(x)
    assert float((aware - wanted).norm()) < float((blind - wanted).norm())


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("nowhere.fc", LayerPlan("blast", 1, 4, 256, 1024), "names layer nowhere.fc"),
        (
            "blocks.2.fc1",
            LayerPlan("blast", 1, 4, 256, 256),
            "1024 x 256, the plan expects 256 x 256",
        ),
        ("blocks.2.norm", LayerPlan("blast", 1, 4, 256, 256), "is a LayerNorm"),
    ],
)
def test_a_plan_for_another_model_leaves_this_one_untouched(name, layer, message):
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = replace(toy_plan(), layers=toy_plan().layers | {name: layer})
    with pytest.raises(IncompatibleInputError, match=message):
        bs.apply(model, plan)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_applying_twice_is_refused():
    model = bs.apply(Net(), toy_plan())
    with pytest.raises(IncompatibleInputError, match="BlastLinear already"):
        bs.apply(model, toy_plan())


def test_save_and_load_are_bit_exact(tmp_path: Path):
    task = ToyTask()
    model = bs.apply(task.model(), toy_plan(), task.calibration())
    bs.save(model, tmp_path / "m")
    again = bs.load(tmp_path / "m", task.model)
    x = task.workload()
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
    assert again.blast_plan.choices == toy_plan().choices
    assert not again.training
    clone = copy.deepcopy(again)
    with torch.no_grad():
        assert torch.equal(clone(x), again(x))
    assert {p.suffix for p in (tmp_path / "m").iterdir()} == {".json", ".safetensors"}


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path):
    plan = Plan(model={}, layers={"shared": LayerPlan("blast", 2, 3, 8, 8)})
    model = bs.apply(Tied(), plan)
    assert model.shared is model.again
    bs.save(model, tmp_path)
    again = bs.load(tmp_path, Tied)
    assert again.out.weight is again.embed.weight
    assert again.shared is again.again
    ids = torch.arange(6).reshape(2, 3)
    assert torch.equal(model(ids), again(ids))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return bs.save(bs.apply(Net(), toy_plan()), tmp_path / "m")


def test_damaged_weights_are_refused(saved: Path):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-10] ^= 1
    for bad in (b"", data[:100], data[:-5], data + b"x", bytes(flipped), pickle.dumps({"a": 1})):
        path.write_bytes(bad)
        with pytest.raises(IncompatibleInputError, match=r"model\.safetensors"):
            bs.load(saved, Net)
    path.write_bytes(data)
    bs.load(saved, Net)  # the original still loads


def test_another_models_folder_is_refused(saved: Path):
    with pytest.raises(IncompatibleInputError, match="another model"):
        bs.load(saved, lambda: Net(width=96))
    with pytest.raises(IncompatibleInputError, match="weights do not fit the model"):
        bs.load(saved, lambda: Net(classes=4))


def test_nan_is_neither_saved_nor_applied(tmp_path: Path):
    model = bs.apply(Net(), toy_plan())
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(IncompatibleInputError, match=r"head\.bias holds NaN"):
        bs.save(model, tmp_path / "x")
    assert not (tmp_path / "x" / "plan.json").exists()
    with pytest.raises(IncompatibleInputError, match="carries no plan"):
        bs.save(Net(), tmp_path / "y")


def test_half_precision_and_training_flags_are_kept():
    model = Net().bfloat16().train()
    model.blocks[0].fc1.weight.requires_grad_(False)
    bs.apply(model, toy_plan())
    layer = model.blocks[0].fc1
    assert layer.U.dtype == torch.bfloat16
    assert layer.training
    assert not layer.U.requires_grad
    assert model.blocks[1].fc2.U.requires_grad
