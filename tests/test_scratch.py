"""Training from the first step: what is replaced, by what, and who learns how fast."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from toy import Net

import blast_search as bs
from blast_search.errors import FallbackWarning, IncompatibleInputError, UsageError


def net() -> nn.Module:
    return Net(width=32, depth=2)


def batch() -> torch.Tensor:
    return torch.randn(4, 3, 32)


def structured(model: nn.Module, num_blocks: int = 4, keep: float = 0.5) -> nn.Module:
    return bs.from_scratch(model, bs.uniform_plan(model, batch(), num_blocks, keep))


def test_every_layer_but_the_head_is_replaced_and_the_model_is_the_same_object():
    model = net()
    state = {name: p.clone() for name, p in model.named_parameters()}
    result = structured(model)
    assert result is model
    layers = [m for m in model.modules() if isinstance(m, bs.BlastLinear)]
    assert [(layer.num_blocks, layer.rank) for layer in layers] == [(4, 12)] * 4
    assert isinstance(model.head, nn.Linear)
    kept = [n for n, p in model.named_parameters() if n in state and torch.equal(p, state[n])]
    assert {"head.weight", "blocks.0.norm.weight", "blocks.1.fc1.bias"} <= set(kept)


def test_tied_weights_and_excluded_layers_stay_dense():
    model = net()
    model.blocks[1].fc1.weight = model.blocks[0].fc1.weight
    space = bs.SearchSpace(exclude=("*.0.fc2",))
    plan = bs.uniform_plan(model, batch(), num_blocks=4, keep=0.5, space=space)
    assert list(plan.layers) == ["blocks.1.fc2"]


def test_blocks_that_do_not_divide_fall_back_and_are_named():
    sizes = [32, 36, 33, 2, 2, 4]
    model = nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(sizes)))
    with pytest.warns(FallbackWarning, match="4 of 4 layers cannot take num_blocks=8") as caught:
        plan = bs.uniform_plan(model, torch.randn(2, 32), num_blocks=8, keep=0.5)
    assert caught[0].filename == __file__
    keys = {name: choice.key for name, choice in plan.choices.items()}
    assert keys == {"0": "b4r6", "1": "b3r8", "2": "b1r1", "3": "dense"}
    for name, key in keys.items():
        assert f"{name} (" in str(caught[0].message)
        assert key in str(caught[0].message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0.5), "num_blocks is 0"), ((4, 1.0), "keep is 1.0"), ((4, 0.0), "keep is 0.0")],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        bs.uniform_plan(net(), batch(), *arguments)


def test_a_model_without_layers_is_refused_with_the_reasons():
    with pytest.raises(IncompatibleInputError, match="0 output head"):
        bs.uniform_plan(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8), 4, 0.5)


def test_a_plan_that_does_not_fit_leaves_the_model_alone():
    plan = bs.uniform_plan(Net(width=32, depth=3), batch(), 4, 0.5)
    model = net()
    with pytest.raises(IncompatibleInputError, match=r"names layer blocks\.2"):
        bs.from_scratch(model, plan)
    assert not any(isinstance(m, bs.BlastLinear) for m in model.modules())


def test_a_plan_from_a_file_is_trained_from_scratch_and_saved(tmp_path: Path):
    bs.uniform_plan(net(), batch(), 4, 0.5).save(tmp_path / "plan.json")
    model = bs.from_scratch(net(), bs.Plan.load(tmp_path / "plan.json"))
    bs.save(model, tmp_path / "model")
    loaded = bs.load(tmp_path / "model", net)
    x = batch()
    assert torch.equal(loaded(x), model.eval()(x))


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_the_models_own_initialisation_stays_in_force(std):
    model = net()
    for block in model.blocks:
        nn.init.normal_(block.fc1.weight, std=std)
        nn.init.zeros_(block.fc2.weight)
    structured(model)
    assert float(model.blocks[0].fc1.to_dense().detach().std()) == pytest.approx(std, rel=0.15)
    zero = model.blocks[0].fc2
    assert float(zero.to_dense().detach().abs().max()) == 0
    model(batch()).sum().backward()
    assert zero.U.grad.abs().max() > 0  # so it can leave zero


def test_groups_hold_every_trainable_parameter_once():
    model = structured(net())
    model.head.bias.requires_grad_(False)
    groups = {g["name"]: g for g in bs.parameter_groups(model, lr=0.01, weight_decay=0.3)}
    listed = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(groups["U"]["params"]) == len(groups["S"]["params"]) == 4
    torch.optim.SGD(list(groups.values()))
    assert [g["name"] for g in bs.parameter_groups(net(), lr=0.01)] == ["rest"]


def test_decay_shrinks_the_matrix_as_it_shrinks_a_dense_weight():
    model = nn.Sequential(bs.BlastLinear(16, 16, 4, 3), nn.Linear(16, 16))
    before = [model[0].to_dense().detach(), model[1].weight.detach().clone()]
    optimizer = torch.optim.AdamW(bs.parameter_groups(model, lr=1e-2, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(20):
        optimizer.step()
    after = [model[0].to_dense().detach(), model[1].weight.detach()]
    shares = [float(b.norm() / a.norm()) for a, b in zip(before, after, strict=True)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)
    assert shares[0] == pytest.approx(0.905, rel=1e-2)


def test_structured_training_lowers_the_loss():
    model = structured(net()).train()
    optimizer = torch.optim.AdamW(bs.parameter_groups(model, lr=3e-3))
    x, labels = torch.randn(64, 3, 32), torch.randint(0, 10, (64,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("example", ["train_vit", "train_lm"])
def test_examples_run(example: str, project: Path):
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{example}", "--steps", "5"],
        cwd=project, env=os.environ | {"PYTHONPATH": str(project)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[-2:]}
    dense, blast = ([float(v.replace(",", "")) for v in rows[k][1:]] for k in ("dense", "blast"))
    assert 0.4 < blast[0] / dense[0] < 0.65  # parameters
    assert 0.4 < blast[1] / dense[1] < 0.65  # multiply-adds
