"""The verbs on saved models: what is worse is not kept, and what they print is the contract's."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import call
from safetensors.torch import load_file
from test_apply import toy_plan
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from toy import ToyTask

import blast_search as bs
from blast_search.calibrate import as_batches
from blast_search.errors import IncompatibleInputError
from blast_search.evaluate import evaluate
from blast_search.prepared import Prepared, prepare, read_calibration
from blast_search.saved import judged
from blast_search.settings import Settings
from blast_search.space import SearchSpace


class Distance(ToyTask):
    """Judged by minus the distance to the dense model's outputs, by which any harm shows."""

    learning_rate = 1e-4

    def evaluate(self, model: nn.Module) -> float:
        return -float((model(self.data[64:]) - self.model()(self.data[64:])).norm())


class Harmful(Distance):
    learning_rate = 10.0


class Starved(Distance):
    def train_batches(self, seed: int) -> Iterator[Tensor]:
        return iter(())


def starved() -> Starved:
    return Starved()


def distance() -> Distance:
    return Distance()


def harmful() -> Harmful:
    return Harmful()


@pytest.fixture
def saved(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    task = ToyTask()
    return bs.save(bs.apply(task.model(), toy_plan(), task.calibration()), tmp_path / "old")


def held(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_retraining_that_harms_leaves_the_folder_as_it_was(saved: Path, capsys):
    before = held(saved)
    task = ("--task", f"{__name__}:harmful", "--steps", "2")
    assert call("retrain", str(saved), *task, "--json") == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["kept"] is False
    assert result["metric"]["after"] < result["metric"]["before"]
    assert "is left as it was" in shown.err
    assert shown.err.count("it is not kept") == 2  # at two rates
    assert held(saved) == before
    assert call("retrain", str(saved), *task, "--out", "other", "-q") == 0
    assert "other holds the model as it was" in capsys.readouterr().err
    old, new = (bs.load(folder, ToyTask().model).state_dict() for folder in (saved, "other"))
    assert all(torch.equal(value, new[name]) for name, value in old.items())


def test_retraining_that_fails_is_an_error(saved: Path, capsys):
    before = held(saved)
    assert call("retrain", str(saved), "--task", f"{__name__}:starved", "--out", "x") == 4
    assert "gave no batch" in capsys.readouterr().err
    assert held(saved) == before
    assert not Path("x").exists()


def test_retraining_that_helps_is_kept(saved: Path, capsys):
    before = held(saved)
    task = ("--task", f"{__name__}:distance", "--steps", "20")
    assert call("retrain", str(saved), *task, "-q", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kept"] is True
    assert result["metric"]["after"] >= result["metric"]["before"]
    assert held(saved)["model.safetensors"] != before["model.safetensors"]
    again = bs.load(saved, ToyTask().model)
    assert evaluate(Distance(), again) == pytest.approx(result["metric"]["after"])


def test_what_retraining_changes_is_not_judged_by_the_old_metric(saved: Path, capsys):
    old = {"metric": {"name": "distance", "compressed": 0.0}, "met_budget": False}
    model = bs.load(saved, ToyTask().model)
    bs.save(model, saved, replace(bs.Plan.load(saved), measured=old))
    task = ("--task", f"{__name__}:distance")
    assert call("retrain", str(saved), *task, "--steps", "20", "-q") == 0
    measured = bs.Plan.load(saved).measured
    assert measured["metric"]["retrained"] > -1e9
    assert measured["met_budget"] is None


def test_names_are_no_markup(saved: Path, monkeypatch, capsys):
    monkeypatch.setattr(Distance, "metric", ("score[/top1]", True))
    saved.rename("m[a]")
    task = ("--task", f"{__name__}:distance", "--seconds")
    for seconds in ("nan", "-5", "inf"):
        assert call("verify", "m[a]", *task, seconds) == 2
    assert call("retrain", "m[a]", *task[:2], "--seed", "-1") == 2
    assert "seed is -1, expected 0 or more" in capsys.readouterr().err
    assert call("verify", "m[a]", *task, "0.1") == 0
    shown = capsys.readouterr().out
    assert "score[/top1]" in shown
    assert "m[a]: measured" in shown


def test_a_measurement_is_judged_by_the_plans_own_budget():
    ratios = {"latency_ratio_layers": 0.3, "latency_ratio_model": 0.5, "macs_ratio": 0.4,
              "params_ratio": 0.6}  # fmt: skip
    timing = SimpleNamespace(worst=0.35)

    def met(drop: float = 0.0, **budget: Any) -> bool | None:
        result = judged(budget, ratios, timing, drop)  # type: ignore[arg-type]
        assert set(result) == {"value", "scope", "max_drop", "met"}
        return result["met"]

    assert met() is None
    for scope, reached in zip(("layers", "model", "macs", "params"), ratios.values(), strict=True):
        assert met(value=reached, scope=scope) is True
        assert met(value=reached - 0.01, scope=scope) is False
    assert met(value=0.32, scope="layers", every_workload=["a", "b"]) is False
    assert met(value=0.35, scope="layers", every_workload=["a", "b"]) is True
    assert met(drop=0.02, value=None, max_drop=0.01) is False
    assert met(drop=0.01, value=0.3, max_drop=0.01) is True


def toy_model() -> nn.Module:
    return ToyTask().model()


def test_a_plan_is_built_in_its_own_dtype(saved: Path, capsys):
    def dtypes(folder: str | Path) -> set[torch.dtype]:
        return {value.dtype for value in load_file(Path(folder) / "model.safetensors").values()}

    assert dtypes(saved) == {torch.float32}
    plan, task = replace(toy_plan(), environment={"dtype": "bfloat16"}), f"{__name__}:distance"
    plan.save("plan.json")
    assert call("apply", "plan.json", "--task", task, "--out", "task", "-q") == 0
    assert call("apply", "plan.json", "--model", f"{__name__}:toy_model", "--out", "model") == 0
    assert dtypes("task") == dtypes("model") == {torch.bfloat16}
    size = [Path(f, "model.safetensors").stat().st_size for f in (saved, "task")]
    assert size[1] < 0.55 * size[0]
    assert call("retrain", "task", "--task", task, "--steps", "2", "--out", "new", "-q") == 0
    assert call("refresh", "task", "--task", task, "--out", "again", "-q") == 0
    assert dtypes("new") == dtypes("again") == {torch.bfloat16}
    capsys.readouterr()
    assert call("verify", "new", "--task", task, "--seconds", "0.5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["environment"]["dtype"] == "bfloat16"
    replace(plan, environment={"dtype": "int3"}).save("odd.json")
    assert call("apply", "odd.json", "--task", task, "--out", "x") == 4
    assert "dtype is 'int3'" in capsys.readouterr().err


class Half(ToyTask):
    def model(self) -> nn.Module:
        return super().model().to(torch.bfloat16)


class Turning(ToyTask):
    """Its model has complex numbers, as rotations (rotary embeddings) and spectral layers do."""

    def model(self) -> nn.Module:
        model = super().model()
        model.turns = nn.Parameter(torch.tensor([1 + 2j]))
        model.register_buffer("angles", torch.tensor([3j]))
        return model


def turning() -> Turning:
    return Turning()


def test_complex_numbers_keep_their_imaginary_part(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dtype in ("float32", "bfloat16"):
        model = prepare(Turning(), Settings(budget=0.5, dtype=dtype), SearchSpace()).model
        assert (model.turns.item(), model.angles.item()) == (1 + 2j, 3j)
        assert model.head.weight.dtype is getattr(torch, dtype)
    replace(toy_plan(), environment={"dtype": "bfloat16"}).save("plan.json")
    assert call("apply", "plan.json", "--task", f"{__name__}:turning", "--out", "m", "-q") == 0
    assert bs.load("m", Turning().model).turns.item() == 1 + 2j


def test_a_model_in_another_dtype_than_asked_is_said():
    def note(task: ToyTask, dtype: str) -> str:
        return prepare(task, Settings(budget=0.5, dtype=dtype), SearchSpace()).note

    assert note(ToyTask(), "float32") == note(Half(), "bfloat16") == ""
    assert "comes in bfloat16 and is searched, measured and saved in float32" in note(
        Half(), "float32"
    )


# Tasks whose model or data cannot be searched, seen before anything is measured


class Odd(ToyTask):
    """The toy task around another model, which `change` makes of its own."""

    def __init__(self, change: Any = lambda model: model) -> None:
        super().__init__()
        self.change = change

    def model(self) -> nn.Module:
        return self.change(super().model())


def ready(task: ToyTask, dtype: str = "float32") -> Prepared:
    prepared = prepare(task, Settings(budget=0.5, dtype=dtype), SearchSpace())
    read_calibration(prepared, 0)
    return prepared


class Around(nn.Module):
    """The toy's network, with something done to its input first."""

    def __init__(self, net: nn.Module, before: Any) -> None:
        super().__init__()
        self.net, self.before = net, before

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.before(x))

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)  # as some do, it returns nothing


def test_outputs_that_differ_from_call_to_call_are_refused():
    def task(before: Any) -> Odd:
        return Odd(lambda net: Around(net, before))

    with pytest.raises(IncompatibleInputError, match="draws random numbers"):
        ready(task(lambda x: nn.functional.dropout(x, 0.1, training=True)))
    with pytest.raises(IncompatibleInputError, match="changes the batch in place"):
        ready(task(lambda x: x.mul_(0.5)))
    for dtype in ("float32", "bfloat16"):  # what is computed in another order is the same
        noise = 1e-6 if dtype == "float32" else 1e-3
        found = ready(task(lambda x, n=noise: x * (1 + n * torch.randn_like(x))), dtype)
        assert len(found.references) == len(found.batches) == 2


def test_a_model_whose_copy_is_not_one_is_refused():
    """Its contenders, built in copies, would be the dense model, and as good."""

    class Hooked(nn.Module):
        def __init__(self, net: nn.Module, strong: bool) -> None:
            super().__init__()
            self.net, self.kept = net, {}
            if strong:
                self.way = lambda x: net(x)
            else:
                net.register_forward_hook(lambda _m, _x, y: self.kept.__setitem__("y", y))

        def forward(self, x: Tensor) -> Tensor:
            if hasattr(self, "way"):
                return self.way(x)
            self.net(x)
            return self.kept["y"]

    with pytest.raises(IncompatibleInputError, match=r"a copy .* calls the original's net"):
        ready(Odd(lambda net: Hooked(net, True)))
    # What the hook keeps is the original's: the last batch's output, not the first one's.
    with pytest.raises(IncompatibleInputError, match=r"a copy .* is .* off, expected"):
        ready(Odd(lambda net: Hooked(net, False)))


def test_a_workload_that_changes_with_every_call_is_refused():
    class Cache:
        length = 0

    class Cached(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            cache.length += 1
            return self.net(x + cache.length)

    task = Odd(Cached)
    task.workload = lambda: {"x": task.data[:16], "cache": Cache()}  # type: ignore[method-assign]
    with pytest.raises(IncompatibleInputError, match="a cache in the batch grows"):
        prepare(task, Settings(budget=0.5), SearchSpace())


def test_layers_that_no_calibration_batch_reaches_are_left_alone():
    """Whatever replaced them changed nothing: they were the first to be."""

    class Experts(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            y = self.experts[0](x) + self.experts[1](x[:0]).sum() + self.experts[2](0 * x)
            return self.net(y if len(x) < 20 else y + self.experts[3](x))

    class Routed(Odd):
        def workload(self) -> Tensor:
            return self.data[:20]

    found = ready(Routed(Experts))
    names = {f"experts.{i}" for i in (1, 2, 3)}
    assert {n for n, why in found.skipped.items() if "calibration" in why} == names
    assert not names & {layer.name for layer in found.layers}
    assert "experts.0" in {layer.name for layer in found.layers}
    assert 0.5 < found.share < 1


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_what_model_returns_is_checked_and_unwrapped():
    with pytest.raises(IncompatibleInputError, match="returned a str, expected the dense model"):
        ready(Odd(lambda net: "net"))
    assert ready(Odd(torch.compile)).layers == ready(ToyTask()).layers

    def locked(net: nn.Module) -> nn.Module:
        net.lock = threading.Lock()  # type: ignore[assignment]
        return net

    with pytest.raises(IncompatibleInputError, match=r"Net cannot be copied: TypeError.*lock"):
        ready(Odd(locked))


def test_one_batch_in_the_place_of_several_is_refused():
    task = ToyTask()
    for data in (task.data[:16], {"x": task.data[:16]}, None):
        task.calibration = lambda data=data: data  # type: ignore[method-assign]
        with pytest.raises(IncompatibleInputError, match="expected a list or another iterable"):
            ready(task)
        if data is not None:
            with pytest.raises(IncompatibleInputError, match="expected a list or another"):
                bs.apply(task.model(), toy_plan(), data)
    rows = TensorDataset(task.data[:2], task.data[:2])  # map-style: no __iter__
    assert len(as_batches(rows)) == 2
    with pytest.raises(IncompatibleInputError, match="called with calibration batch 1"):
        bs.apply(task.model(), toy_plan(), [task.data[:2], task.data[:2, :, :3]])


def test_an_error_of_a_cast_model_tells_of_the_cast():
    class Fixed(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net.to(torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.to(torch.bfloat16))

    with pytest.raises(IncompatibleInputError, match=r"workload.*comes in bfloat16.*--dtype"):
        ready(Odd(Fixed))
    assert ready(Odd(Fixed), "bfloat16").layers
