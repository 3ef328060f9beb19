"""Published architectures without weights: sizes, causality, caches, cells without storage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from blast_search.batches import call_model
from blast_search.cli import app
from blast_search.errors import UsageError
from blast_search.evaluate import workloads_of
from blast_search.layers import inventory
from blast_search.prepared import prepare
from blast_search.settings import Settings
from blast_search.space import SearchSpace
from blast_search.tasks import load_task, shapes
from blast_search.tasks.shapes import SHAPES, ShapesTask, Transformer

# Parameters of the published models, in billions, and how many layers a search has.
PUBLISHED = {
    "llama-7b": (6.74, 32 * 7), "llama-3-8b": (8.03, 32 * 7), "gpt2": (0.124, 12 * 4),
    "vit-l": (0.304, 24 * 4), "dit-xl": (0.675, 28 * 5),
}  # fmt: skip
SMALL = {"width": 64, "depth": 2, "heads": 4, "hidden": 96, "vocab": 50, "tokens": 12}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """Every architecture at a toy's size."""
    for name, shape in SHAPES.items():
        sizes = {k: v for k, v in SMALL.items() if shape.vocab or k not in ("vocab", "tokens")}
        sizes |= {"kv_heads": 2} if shape.kv_heads else {}
        sizes |= {} if shape.vocab else {"tokens": 9, "inputs": 20, "outputs": 10}
        monkeypatch.setitem(SHAPES, name, replace(shape, **sizes))


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_the_published_ones(name: str):
    settings = Settings(task=f"shapes:{name}", budget=0.5)
    prepared = prepare(load_task(settings.task), settings, SearchSpace(), meta=True)
    billions, layers = PUBLISHED[name]
    parameters = sum(p.numel() for p in prepared.model.parameters())
    if name == "gpt2":  # its output head is the embedding, here it is a matrix of its own
        parameters -= prepared.model.head.weight.numel()  # type: ignore[union-attr,operator]
    assert parameters / 1e9 == pytest.approx(billions, rel=0.02)
    # A linear embedding of images is searched as well.
    assert len(prepared.layers) - ("embed" in {ly.name for ly in prepared.layers}) == layers
    assert prepared.skipped == {"head": "output head"}
    assert prepared.cells()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("small")
def test_a_model_without_storage_has_the_same_layers(name: str):
    task = ShapesTask(name)
    workloads = workloads_of(task)
    model = task.model().eval()
    with torch.device("meta"):
        bare = task.model().eval()
    assert inventory(model, workloads, SearchSpace()) == inventory(bare, workloads, SearchSpace())


@pytest.mark.parametrize("name", ["llama-7b", "llama-3-8b", "gpt2"])
@pytest.mark.usefixtures("small")
def test_generating_with_a_cache_is_the_whole_text_at_once(name: str):
    task = ShapesTask(name)
    model, shape = task.model().eval(), task.shape
    ids = torch.randint(0, shape.vocab, (3, 7))
    whole = model(ids)
    heads = shape.kv_heads or shape.heads
    cache = torch.zeros(shape.depth, 2, 3, heads, 7, shape.head_size)
    first = torch.zeros(shape.depth, 2, 3, heads, 6, shape.head_size)
    with torch.no_grad():
        assert torch.allclose(model(ids[:, :6], cache=first), whole[:, :6], atol=1e-5)
        cache[..., :6, :] = first
        assert torch.allclose(model(ids[:, 6:], cache=cache), whole[:, 6:], atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("small")
def test_tasks_are_complete(name: str):
    task = ShapesTask(name)
    model = task.model().eval()
    assert task.evaluate(model) == 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert task.evaluate(model) > 1e-4
    batch = next(iter(task.train_batches(0)))
    loss = task.loss(model, batch, task.model().eval())
    loss.backward()
    assert loss.item() > 0
    for workload in workloads_of(task, "4x3,one:2x1"):
        assert torch.isfinite(call_model(model, workload.batch)).all()


def test_weights_decay_differently_by_layer():
    task = ShapesTask("gpt2")
    task.shape = replace(task.shape, width=64, depth=2, heads=4, hidden=96, vocab=50)
    spectra = [
        torch.linalg.svdvals(block.up.weight.detach()) for block in task.model().blocks  # type: ignore[union-attr]
    ]  # fmt: skip
    shares = [float(s[:16].square().sum() / s.square().sum()) for s in spectra]
    plain = torch.linalg.svdvals(torch.randn(96, 64))
    assert min(shares) > float(plain[:16].square().sum() / plain.square().sum()) + 0.05
    assert abs(shares[0] - shares[1]) > 0.01


def test_unknown_shapes_are_refused():
    with pytest.raises(UsageError, match="unknown shapes 'gpt9', expected one of llama-7b"):
        load_task("shapes:gpt9")


@pytest.mark.usefixtures("small")
def test_the_command_line_profiles_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        shapes, "Transformer",
        lambda shape: Transformer(shape) if torch.empty(()).is_meta else pytest.fail("built"),
    )  # fmt: skip
    out = tmp_path / "p"
    args = ["profile", "--shapes", "llama-3-8b", "--workers", "local", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, args, standalone_mode=False)
    assert done.exit_code == 0, done.output
    assert done.return_value["cells"] > 6  # what --json prints
    names = {layer["name"] for layer in json.loads((out / "layers.json").read_text())["layers"]}
    assert "blocks.1.gate" in names
    both = CliRunner().invoke(app, ["profile", "--shapes", "gpt2", "--task", "vit"])
    assert both.exit_code != 0
    assert "exclude each other" in str(both.exception)


def test_rotations_are_those_of_pairs_half_a_head_apart():
    x = torch.randn(2, 3, 5, 8)
    angles = torch.arange(7, 12)[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    a, b = x[..., :4], x[..., 4:]
    cos, sin = angles.cos(), angles.sin()
    exact = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    torch.testing.assert_close(shapes.rotated(x, shapes.rotation_of(7, 5, 8, x)), exact)
