"""What will run on a GPU, at a toy's size on this device; and the roofline: arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    monkeypatch.syspath_prepend(str(project / "benchmarks"))


@pytest.mark.usefixtures("scripts")
def test_the_roofline_is_bytes_for_one_token_and_operations_for_many():
    import roofline

    limits = (1e12, 100e12)
    assert roofline.floor_us(1, 10**6, 2000, limits) == pytest.approx(2 * (10**6 + 2000) / 1e6)
    many = roofline.floor_us(4096, 10**6, 2000, limits)
    assert many == pytest.approx(2 * 4096 * 10**6 / 100e12 * 1e6)


@pytest.mark.usefixtures("scripts")
def test_the_roofline_of_a_published_architecture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import roofline

    args = ["roofline.py", "llama-3-8b", "--bytes", "3.35e12", "--flops", "989e12"]
    monkeypatch.setattr(sys, "argv", args)
    roofline.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    every = [row for row in rows if row[0].strip() == "all"]
    assert {row[1].strip() for row in every} == {"224"}
    half = [float(row[7]) for row in every if row[4].strip() == "0.5"]
    assert half
    assert all(1.9 < gain < 2.1 for gain in half)


@pytest.mark.usefixtures("scripts")
def test_every_matrix_of_a_model_is_factorised_and_beats_precgd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import gpu_model

    args = ["gpu_model.py", "factorize", "--shapes", "tiny", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", args)
    gpu_model.main()
    found = json.loads((tmp_path / "factorize-tiny.json").read_text())
    assert found["matrices"] == found["of"] == 21
    assert len(found["precgd"]) == 3  # shapes
    for row in found["precgd"]:
        assert 0 < row["als"] < row["precgd_300"]


@pytest.mark.usefixtures("scripts")
def test_the_plan_of_equal_score_is_never_worse_in_score_than_the_uniform_one(
    monkeypatch: pytest.MonkeyPatch,
):
    import gpu_model

    from blast_search.latency_model import LatencyModel
    from blast_search.progress import SILENT
    from blast_search.tables import LatencyTable, Measurement

    p = gpu_model.prepared("tiny", SILENT)
    table = LatencyTable(p.fingerprint)
    for cell in p.cells():  # as if every multiply-add took the same time
        share = cell.candidate.params(cell.out_features, cell.in_features)
        share /= cell.out_features * cell.in_features
        us = 100 * share
        table.add(cell, Measurement(us, us, us, 9, 100.0, share, share, share))
    quality = gpu_model.scores(p, SILENT)
    assert set(quality.scores) == {layer.name for layer in p.layers}
    uniform = {
        ly.name: p.space.uniform_choice(ly, gpu_model.BLOCKS, gpu_model.KEEP) for ly in p.layers
    }
    limit = gpu_model.loss(quality, uniform)
    latency = LatencyModel(p.layers, table)
    plan = gpu_model.fastest(latency, quality, limit)
    assert gpu_model.loss(quality, plan) <= limit * (1 + 1e-9)
    assert (latency.ratio(plan) or 1) < (latency.ratio(uniform) or 0)


@pytest.mark.usefixtures("scripts")
def test_the_kept_summary_is_made_from_the_kept_figures(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import gpu_summary

    kept = project / "results" / "gpu" / "nvidia-h200"
    for path in kept.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(sys, "argv", ["gpu_summary.py", str(tmp_path)])
    gpu_summary.main()
    for name in ("README.md", "table.md"):
        assert (tmp_path / name).read_text() == (kept / name).read_text()
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.usefixtures("scripts")
def test_the_kernels_script_runs_dry(tmp_path: Path, project: Path):
    command = ["gpu.py", "--shapes", "tiny", "--interpret", "--out", str(tmp_path)]
    script = [sys.executable, str(project / "benchmarks" / command[0]), *command[1:]]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "layer.json").read_text())
    assert found["finished"]
    assert found["interpreted"]
    assert {(row["tokens"], row["b"]) for row in found["layers"]} == {
        (t, b) for t in (1, 7, 70) for b in (1, 4)
    }
