"""The gradient at a plan, and what it predicts of other plans, beside what they really lose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import WIDTH, Block, ToyTask

from blast_search.deadline import Deadline
from blast_search.engine import Engine
from blast_search.judge import Judge
from blast_search.layers import Workload, find_layers
from blast_search.matrix import BlastLinear
from blast_search.model_latency import steered
from blast_search.outputs import divergence
from blast_search.pipeline import opened
from blast_search.progress import SILENT
from blast_search.settings import Settings
from blast_search.space import DENSE, Candidate, SearchSpace
from blast_search.tangent import SPAN, Tangent

SPACE = SearchSpace(name="default", num_blocks=(1, 2), keep=(0.1, 0.2, 0.3, 0.4, 0.5))
PLAN = {"blocks.0.fc1": Candidate(2, 64), "blocks.1.fc2": Candidate(1, 40)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    out = tmp_path_factory.mktemp("tangent") / "toy"
    settings = Settings("toy", 0.4, "macs", profile="pruned")
    with opened(settings, ToyTask(), SPACE, out, False, "local", None, SILENT) as pipeline:
        yield pipeline.measured()


def whole(engine: Engine) -> dict[str, Candidate]:
    return {layer.name: PLAN.get(layer.name, DENSE) for layer in engine.layers}


def test_the_gradient_is_that_of_the_effective_weights(engine: Engine):
    """Against autograd on a dense model that holds the plan's matrices."""
    judge, plan = engine.panel.judge, whole(engine)
    found = judge.gradients(plan, engine.order)
    model = ToyTask().model()
    for name, module in judge.fitter.modules(plan).items():
        if isinstance(module, BlastLinear):
            model.get_submodule(name).weight.data = module.to_dense().detach()
    batches = [judge.batches[k] for k in engine.order]
    losses = [
        divergence(model(batch), judge.wanted()[k], batch)
        for k, batch in zip(engine.order, batches, strict=True)
    ]
    (sum(losses) / len(losses)).backward()  # type: ignore[union-attr]
    assert set(found) == {layer.name for layer in engine.layers}
    for name, gradient in found.items():
        expected = model.get_submodule(name).weight.grad
        assert expected is not None
        # Rounding turns a ReLU round here and there, and with it one row.
        assert float((gradient - expected).norm() / expected.norm()) < 1e-2


def test_the_model_is_left_as_it_was(engine: Engine):
    model, x = engine.model, ToyTask().workload()
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        before = model(x)
    engine.panel.judge.gradients(whole(engine), engine.order)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    with torch.no_grad():
        after = model(x)
    assert torch.equal(before, after)
    assert not after.requires_grad


@pytest.mark.parametrize("name", ["blocks.0.fc1", "blocks.1.fc2"])
def test_a_slope_is_the_derivative_towards_a_candidate(engine: Engine, name: str):
    """Against a finite difference along W(t) = (1 - t) W_plan + t W_candidate."""
    plan = {layer.name: engine.space.uniform_choice(layer, 1, 0.3) for layer in engine.layers}
    tangent = Tangent.at(engine, plan, engine.true_loss("start", plan))
    judge, model = engine.panel.judge, ToyTask().model().double()
    for other, module in judge.fitter.modules(plan).items():
        model.get_submodule(other).weight.data = module.to_dense().double()
    weight = model.get_submodule(name).weight.data.clone()

    def loss(t: float, matrix: Tensor) -> float:
        model.get_submodule(name).weight.data = weight + t * (matrix - weight)
        with torch.no_grad():
            return fmean(
                float(divergence(model(batch.double()), judge.wanted()[k], batch))
                for k, batch in enumerate(judge.batches)
            )

    assert {c.candidate.num_blocks for c in tangent.changes[name]} >= {1, 2}
    for change in tangent.changes[name]:
        module = judge.fitter.module(name, change.candidate)
        dense = module.to_dense() if isinstance(module, BlastLinear) else module.weight
        difference = loss(1e-3, dense.double()) - loss(-1e-3, dense.double())
        assert change.slope == pytest.approx(difference / 2e-3, rel=0.05, abs=1e-5)


def test_the_plan_itself_costs_nothing_and_its_budget_holds(engine: Engine):
    plan = engine.exact(0.4)
    tangent = Tangent.at(engine, plan, engine.true_loss("exact", plan))
    for name, changes in tangent.changes.items():
        assert 1 < len(changes) <= 2 * SPAN + 1
        (own,) = (c for c in changes if c.candidate == plan[name])
        assert (own.slope, own.bend) == (0.0, 0.0)
    other = tangent.solve(0.4, 0.5)
    assert (engine.predicted_ratio(other) or 9.0) <= 0.4
    # So little trust is put in the slope that nothing changes.
    assert tangent.solve(0.4, 1e9) == plan


def test_nothing_more_is_fitted_once_the_time_is_over(engine: Engine):
    plan = engine.uniform(2, 0.3)
    tangent = Tangent.at(engine, plan, engine.true_loss("start", plan), Deadline(0.0))
    for name, changes in tangent.changes.items():
        offered = {c.candidate for c in changes}
        assert {c for c in offered if c.num_blocks > 1} <= {plan[name]}


class Rounded(nn.Module):
    """In place, by keyword, and without a gradient at its end, if asked for."""

    def __init__(self, rounds: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 64), nn.Linear(64, 64)
        self.act, self.rounds = nn.ReLU(inplace=True), rounds
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.act(self.second(input=self.act(self.first(x)))))
        return y.detach().round() if self.rounds else y


@pytest.mark.parametrize("rounds", [False, True])
def test_layers_in_place_and_by_keyword_and_outputs_without_a_gradient(rounds: bool):
    from blast_search.fitting import Fitter

    torch.manual_seed(0)
    model, x = Rounded(rounds).eval(), torch.randn(64, WIDTH)
    layers = find_layers(model, [Workload("w", x)])
    judge = Judge(model, layers, Fitter(model, layers, {}, {}), [x])
    plan = {layer.name: DENSE for layer in layers} | {"first": Candidate(1, 4)}
    if rounds:
        with pytest.raises(RuntimeError, match="does not require grad"):
            judge.gradients(plan, [0])
    else:
        found = judge.gradients(plan, [0])
        assert {name: tuple(g.shape) for name, g in found.items()} == {
            "first": (64, WIDTH), "second": (64, 64),
        }  # fmt: skip
        assert all(bool(g.abs().sum() > 0) for g in found.values())
    assert all(p.requires_grad for p in model.parameters())


def test_inputs_that_are_changed_in_place_give_no_gradient(engine: Engine, monkeypatch):
    """The layer's rows are the input's memory: a wrong gradient would lead the steps astray."""

    def forward(self: Block, x: Tensor) -> Tensor:
        normed = self.norm(x)
        y = self.fc1(normed)
        normed += 1
        return x + self.fc2(torch.relu(y))

    monkeypatch.setattr(Block, "forward", forward)
    with pytest.raises(RuntimeError, match=r"the input of blocks\.2\.fc1 in place"):
        engine.panel.judge.gradients(whole(engine), engine.order)


class Settling(nn.Module):
    """Iterates until it changes little, for at most 40 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.step.weight.mul_(0.2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(40):
            before, z = z, torch.tanh(self.step(z)) + x
            if float((z - before).abs().max()) < 1e-3:
                break
        return self.out(z)


def test_models_whose_values_say_what_they_call_are_timed_as_they_will_be(
    engine: Engine, monkeypatch
):
    workloads = [Workload("w", torch.randn(4, 16))]
    model = Settling()
    layers = find_layers(model, workloads, SearchSpace(output_head=True))
    assert steered(model, layers, workloads) == ["step"]
    assert steered(engine.model, engine.layers, engine.workloads) == []
    timed: list[Any] = []

    def spy(_model: nn.Module, _layers: Any, variants: Any, *_: Any, mode: str) -> Any:
        timed.append(variants)
        raise KeyboardInterrupt

    monkeypatch.setattr("blast_search.engine.time_variants", spy)
    fitted = {name: m.to_dense() for name, m in engine.fitter.modules(PLAN).items()}
    for values in (True, False):
        other = replace(engine, steered=values)
        with pytest.raises(KeyboardInterrupt):
            other.time("some", {"plan": whole(engine)}, 0.1)
        modules = timed[-1]["plan"]
        assert set(modules) == set(PLAN)
        assert all(torch.equal(modules[n].to_dense(), fitted[n]) for n in PLAN) == values
