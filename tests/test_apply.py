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
from blast_search.apply import copied
from blast_search.errors import IncompatibleInputError
from blast_search.layers import Workload
from blast_search.model_latency import time_variants
from blast_search.plan import LayerPlan, Plan
from blast_search.space import Candidate


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


@pytest.mark.parametrize(
    ("factory", "plan"),
    [(Net, toy_plan()), (Tied, Plan({}, {"shared": LayerPlan("blast", 2, 3, 8, 8)}))],
)
def test_the_same_weights_have_the_same_digest(
    factory: type[nn.Module], plan: Plan, tmp_path: Path
):
    model = bs.apply(factory(), plan)
    digests = {Plan.load(bs.save(model, tmp_path / str(i))).weights_sha256 for i in range(8)}
    assert len(digests) == 1


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


def test_factories_may_leave_weights_uninitialised(saved: Path):
    def empty() -> nn.Module:
        model = Net()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        return model

    loaded, wanted = bs.load(saved, empty).state_dict(), bs.load(saved, Net).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())
    with pytest.raises(IncompatibleInputError, match="its weight holds NaN"):
        bs.apply(empty(), toy_plan())


def test_half_precision_and_training_flags_are_kept():
    model = Net().bfloat16().train()
    model.blocks[0].fc1.weight.requires_grad_(False)
    bs.apply(model, toy_plan())
    layer = model.blocks[0].fc1
    assert layer.U.dtype == torch.bfloat16
    assert layer.training
    assert not layer.U.requires_grad
    assert model.blocks[1].fc2.U.requires_grad


class Masked(nn.Module):
    """A causal mask of infinities in a buffer, and a square weight tied to another's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.out.weight = nn.Parameter(self.fc.weight.t())
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))

    def forward(self, x):
        return self.out(self.fc(x))


def test_infinite_buffers_and_transposed_twins_are_saved(tmp_path: Path):
    model = Masked()
    assert model.out.weight.data_ptr() == model.fc.weight.data_ptr()
    bs.save(model, tmp_path / "m", Plan(model={}, layers={}))
    loaded = bs.load(tmp_path / "m", Masked)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        model.fc.bias[3] = float("inf")
    with pytest.raises(IncompatibleInputError, match=r"fc\.bias holds NaN or infinity"):
        bs.save(model, tmp_path / "m", Plan(model={}, layers={}))
    bs.load(tmp_path / "m", Masked)  # what was there stays


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_the_saved_dtype_comes_back_whatever_the_factory_builds(tmp_path: Path, saved):
    other = torch.float32 if saved is torch.bfloat16 else torch.bfloat16
    model = bs.apply(ToyTask().model(), toy_plan()).to(saved)
    bs.save(model, tmp_path / "m")
    loaded = bs.load(tmp_path / "m", lambda: ToyTask().model().to(other))
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype is saved
        assert torch.equal(loaded.state_dict()[name], value), name


class Scaled(nn.Module):
    """A buffer that is not saved takes part in a product with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)
        self.register_buffer("mix", torch.randn(16, 16), persistent=False)
        self.register_buffer("order", torch.arange(16), persistent=False)

    def forward(self, x):
        return self.b(self.a(x) @ self.mix)


def test_buffers_that_are_not_saved_get_the_saved_dtype(tmp_path: Path):
    torch.manual_seed(3)
    model, layers = Scaled(), {"a": LayerPlan("blast", 2, 3, 16, 16)}
    model = bs.apply(model, Plan(model={}, layers=layers)).bfloat16()
    bs.save(model, tmp_path)

    def factory() -> nn.Module:
        torch.manual_seed(3)
        return Scaled()

    again, x = bs.load(tmp_path, factory), torch.randn(2, 16).bfloat16()
    assert torch.equal(again(x), model(x))
    assert again.order.dtype is torch.int64

    def mixed() -> nn.Module:  # it builds the saved dtype, and knows which buffers need another
        model = factory().bfloat16()
        model.mix = model.mix.float()
        return model

    assert bs.load(tmp_path, mixed).mix.dtype is torch.float32


def test_factories_whose_tensors_have_no_values_are_refused(saved: Path):
    def meta() -> nn.Module:
        with torch.device("meta"):
            return Net()

    def lazy() -> nn.Module:
        model = Net()
        model.blocks[2].fc1, model.head = nn.LazyLinear(1024), nn.LazyLinear(10)
        return model

    for factory in (meta, lazy):
        with pytest.raises(IncompatibleInputError, match=r"model_factory.*head\.weight") as error:
            bs.load(saved, factory)
        assert "real device" in str(error.value)
        assert "run one batch" in str(error.value)


class Stateful(nn.Linear):
    """Keeps something in its state that is no tensor."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


def test_state_that_cannot_be_saved_is_refused_before_the_search(tmp_path: Path):
    model = nn.Sequential(nn.Linear(8, 8), Stateful(8, 8), nn.Linear(8, 2))
    for workloads in ([], [Workload("w", torch.randn(2, 8))]):
        with pytest.raises(IncompatibleInputError, match=r"1\._extra_state is a dict"):
            bs.find_layers(model, workloads)
    with pytest.raises(IncompatibleInputError, match=r"1\._extra_state is a dict"):
        bs.save(model, tmp_path, Plan(model={}, layers={}))
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_buffer("fixed", torch.eye(3).to_sparse())
    with pytest.raises(IncompatibleInputError, match="fixed is a tensor of layout"):
        bs.find_layers(model, [])


def test_buffers_that_share_memory_are_saved(tmp_path: Path):
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("table", torch.randn(6, 4))
            self.register_buffer("start", self.table[:2])
            self.register_buffer("flat", self.table.view(-1))
            self.register_buffer("same", self.table)

    model = Windows()
    bs.save(model, tmp_path, Plan(model={}, layers={}))
    loaded = bs.load(tmp_path, Windows).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_a_disk_that_is_full_leaves_the_old_model(tmp_path: Path, monkeypatch):
    model = bs.apply(ToyTask().model(), toy_plan())
    bs.save(model, tmp_path / "m")

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr("blast_search.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        bs.save(model, tmp_path / "m")
    bs.load(tmp_path / "m", ToyTask().model)


def test_copies_share_only_what_is_replaced():
    model = Tied().eval()
    layers = bs.find_layers(model, [Workload("w", torch.zeros(2, 5, dtype=torch.long))])
    names = {layer.name for layer in layers}
    twin = copied(model, layers, names)
    shared = {n for n, p in twin.named_parameters() if p is dict(model.named_parameters())[n]}
    assert shared == {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    tied = [replace(layers[0], name="left", aliases=())]  # its weight is another layer's, too
    again = copied(model, tied, {"left"})
    assert again.left.weight is not model.left.weight
    assert again.left.weight is again.right.weight


def test_layers_may_be_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.head = nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.fc(input=x)))

    model, x = Keyword(), torch.randn(8, 32)
    layers = bs.find_layers(model, [Workload("w", x)])
    assert [layer.name for layer in layers] == ["fc"]
    time_variants(model, layers, {}, [Workload("w", x)], 0.01, 2, 3)
    chosen = {"fc": LayerPlan.of(layers[0], Candidate(2, 16))}
    applied = bs.apply(model, bs.Plan(model={}, layers=chosen), [x])
    assert applied(x).shape == (8, 4)
