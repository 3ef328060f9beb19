"""refresh: the old factors carry over to a new checkpoint, never for the worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import call
from test_apply import toy_plan
from test_saved import held
from torch import Tensor, nn
from toy import Net, ToyTask

import blast_search as bs
from blast_search import factorize
from blast_search.errors import IncompatibleInputError
from blast_search.factors import relative_error
from blast_search.refresh import REFRESH_SWEEPS, refit


class Updated(ToyTask):
    """The toy task after some more training: every parameter has moved by about 5 %."""

    def model(self) -> nn.Module:
        model = super().model()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                noise = torch.randn(p.shape, generator=generator)
                p += 0.05 * noise * p.norm() / p.numel() ** 0.5
        return model


def updated() -> Updated:
    return Updated()


def other_shapes() -> nn.Module:
    return Net(depth=2)


def other_head() -> nn.Module:
    return Net(classes=11)


def correlated(m: int, n: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(500, n) @ (torch.randn(n, n) * torch.linspace(1, 0.05, n))
    return torch.randn(m, n) * torch.linspace(2, 0.1, n), x.T @ x / len(x)


@pytest.mark.parametrize("use_gram", [False, True])
def test_a_warm_start_needs_fewer_sweeps(use_gram: bool):
    weight, gram = correlated(64, 96)
    g = gram if use_gram else None
    old = factorize(weight, 4, 16, g)
    moved = weight + 0.05 * torch.randn_like(weight) * weight.std()
    cold = factorize(moved, 4, 16, g, sweeps=20)
    assert factorize(moved, 4, 16, g, REFRESH_SWEEPS, initial=old).error <= cold.error
    assert factorize(moved, 4, 16, g, REFRESH_SWEEPS).error > cold.error


@pytest.mark.parametrize("moved_by", [0.0, 0.1, 30.0])
@pytest.mark.parametrize(("b", "use_gram"), [(1, True), (4, False), (4, True)])
def test_never_worse_than_the_old_factors_nor_than_low_rank(b, use_gram, moved_by):
    weight, gram = correlated(32, 48)
    g = gram if use_gram else None
    old = bs.BlastLinear(48, 32, b, 6, bias=False)
    old.set_factors(factorize(weight, b, 6, g))
    moved = weight + moved_by * torch.randn_like(weight)
    before = relative_error(moved, (old.U.data, old.S.data, old.V.data), g)
    factors, errors = refit(moved, old, g)
    real = relative_error(moved, (factors.U, factors.S, factors.V), g)
    assert errors.before == pytest.approx(before, rel=1e-6)
    assert errors.after == pytest.approx(real, rel=1e-6)
    assert errors.after <= errors.before
    assert errors.after <= factorize(moved, 1, 6, g).error * (1 + 1e-4)


def test_an_initial_of_another_shape_is_refused():
    old = factorize(torch.randn(16, 16), 2, 3)
    with pytest.raises(ValueError, match=r"initial has a \(2, 8, 3\), expected \(2, 8, 4\)"):
        factorize(torch.randn(16, 16), 2, 4, initial=old)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    task = ToyTask()
    return bs.save(bs.apply(task.model(), toy_plan(), task.calibration()), tmp_path / "old")


def test_everything_but_the_factors_comes_from_the_new_checkpoint(saved: Path):
    task = Updated()
    model, errors = bs.refresh(saved, task.model, task.calibration())
    new, old = task.model().state_dict(), bs.load(saved, task.model).state_dict()
    assert set(errors) == {"blocks.0.fc1", "blocks.1.fc2"}
    for name, value in model.state_dict().items():
        if name in new:
            assert torch.equal(value, new[name]), name
        elif not name.endswith(".S"):  # b = 1: all ones
            assert not torch.equal(value, old[name]), name
    for error in errors.values():
        assert error.after < error.before


@pytest.mark.parametrize(
    ("make", "message"),
    [(other_shapes, r"names layer blocks\.2\.fc2"), (other_head, r"head\.bias, head\.weight")],
)
def test_another_checkpoint_is_refused_by_name_and_nothing_is_written(saved, make, message):
    before = held(saved)
    with pytest.raises(IncompatibleInputError, match=message):
        bs.refresh(saved, make)
    assert held(saved) == before


def test_the_verb(saved: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task, made = f"{__name__}:updated", f"{__name__}:other_head"
    before = held(saved)
    assert call("refresh", str(saved), "-q") == 2
    assert "give one with --task" in capsys.readouterr().err
    assert call("refresh", str(saved), "--model", made, "-q") == 4
    assert "head.weight" in capsys.readouterr().err
    assert call("refresh", str(saved), "--model", f"{__name__}:task_of_old", "-q") == 2
    assert call("refresh", "nowhere", "--task", task) == 4
    assert held(saved) == before
    capsys.readouterr()
    assert call("refresh", str(saved), "--task", task, "--out", "new", "-q", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    for error in result["relative_errors"].values():
        assert 0 < error["after"] <= error["before"]
    assert held(saved) == before
    new = bs.load("new", updated().model)
    assert torch.equal(new.head.weight, updated().model().head.weight)
    assert call("refresh", str(saved), "--task", task) == 0
    assert "2 layers fitted again" in capsys.readouterr().err
    again = bs.load(saved, updated().model)
    x = updated().workload()
    with torch.no_grad():
        assert torch.equal(again(x), new(x))
    assert bs.Plan.load(saved).choices == toy_plan().choices
