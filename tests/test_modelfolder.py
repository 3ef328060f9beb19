"""A model's folder: whatever is saved can be loaded, and nothing else is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_apply import toy_plan
from torch import nn
from toy import Net, ToyTask

import blast_search as bs
from blast_search import modelfolder
from blast_search.errors import IncompatibleInputError


def test_a_compiled_model_is_saved_as_the_model_in_it(tmp_path: Path):
    model = bs.apply(Net(), toy_plan())
    compiled = torch.compile(model, backend="eager")
    bs.save(compiled, tmp_path)  # type: ignore[arg-type]
    loaded = bs.load(tmp_path, Net)
    assert all(
        torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True)
    )


def test_a_model_that_is_not_what_its_plan_makes_is_not_saved(tmp_path: Path):
    plan = toy_plan()
    model = bs.apply(Net(), plan)
    for odd, got in (
        (Net(), "Net has dense"), (nn.DataParallel(model), "DataParallel has no such layer"),
    ):  # fmt: skip
        with pytest.raises(IncompatibleInputError, match=got):
            bs.save(odd, tmp_path / "new", plan)
    assert not (tmp_path / "new").exists()


def test_saving_over_a_model_that_is_interrupted_leaves_the_old_one(tmp_path: Path, monkeypatch):
    model = bs.apply(Net(), toy_plan())
    bs.save(model, tmp_path)
    old = [p.detach().clone() for p in model.parameters()]
    write, calls = modelfolder.write_bytes, []

    def stopped(path: Path, data: bytes) -> None:
        write(path, data)
        calls.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(modelfolder, "write_bytes", stopped)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with pytest.raises(KeyboardInterrupt):
        bs.save(model, tmp_path)
    assert calls
    loaded = bs.load(tmp_path, Net)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), old, strict=True))


def test_buffers_of_a_first_call_and_conjugated_ones_come_back(tmp_path: Path):
    class Cached(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", None)
            self.register_buffer("roots", torch.randn(4, dtype=torch.complex64).conj())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.cache is None:
                self.cache = torch.full((3,), float(x.shape[0]))
            return super().forward(x)

    model = bs.apply(Cached(), toy_plan())
    x = ToyTask().data[:2]
    wanted = model(x)
    bs.save(model, tmp_path)
    loaded = bs.load(tmp_path, Cached)
    assert torch.equal(loaded.cache, model.cache)
    assert torch.equal(loaded.roots, model.roots)
    assert torch.equal(loaded(x), wanted)
