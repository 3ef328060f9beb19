"""The text of a Hugging Face dataset: rows become documents, splits stay disjoint, errors help."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from test_tasks import needs_transformers, save_tiny

from blast_search.errors import IncompatibleInputError, MissingDependencyError, UsageError
from blast_search.tasks import _support, load_task
from blast_search.tasks._dataset import read_dataset
from blast_search.tasks._text import PARTS, split_documents
from blast_search.tasks.hf import CHARACTERS, PER_TOKEN, HFTask

datasets: Any = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _quiet_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No progress bars of ours, and a cache of datasets that is nobody else's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def saved(folder: Path, **columns: list[Any]) -> str:
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    return str(folder)


def sentences(count: int, word: str = "word") -> list[str]:
    return [f"{word}{i} {word}{i} {word}{i}." for i in range(count)]


# Rows to documents


def test_short_rows_are_joined_into_disjoint_documents_without_loss(tmp_path: Path) -> None:
    rows = sentences(5000)
    documents = read_dataset(saved(tmp_path / "data", text=rows), 10**9)
    assert len(documents) == PARTS
    assert "\n".join(documents).splitlines() == rows
    parts = [set("\n".join(part).splitlines()) for part in split_documents(documents)]
    assert all(not one & other for one, other in combinations(parts, 2))


def test_a_large_dataset_is_read_in_part_and_from_all_over(tmp_path: Path) -> None:
    rows = sentences(20_000)
    documents = read_dataset(saved(tmp_path / "data", text=rows), 64_000)
    assert len(documents) == PARTS
    assert all(900 < len(document) <= 1000 for document in documents)
    starts = [document.splitlines()[0] for document in documents]
    assert starts == [rows[part * 20_000 // PARTS] for part in range(PARTS)]


def test_few_long_rows_are_a_document_each_and_very_few_are_cut(tmp_path: Path) -> None:
    rows = [" ".join(sentences(300, f"of{i}x")) for i in range(20)]
    assert read_dataset(saved(tmp_path / "some", text=rows), 10**9) == rows
    cut = read_dataset(saved(tmp_path / "few", text=rows[:3]), 10**9)
    assert 8 <= len(cut) <= PARTS + 1
    assert " ".join(cut).split() == " ".join(rows[:3]).split()


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    rows = [text for row in sentences(100) for text in (row, "", None, " \n")]
    documents = read_dataset(saved(tmp_path / "data", text=rows), 10**9)
    assert "\n".join(documents).splitlines() == sentences(100)


# Columns and splits


def test_the_column_text_is_read_or_else_the_first_of_strings(tmp_path: Path) -> None:
    other, text = sentences(100, "other"), sentences(100)
    both = saved(tmp_path / "both", number=list(range(100)), other=other, text=text)
    assert "\n".join(read_dataset(both, 10**9)).splitlines() == text
    lone = saved(tmp_path / "lone", number=list(range(100)), other=other, third=text)
    assert "\n".join(read_dataset(lone, 10**9)).splitlines() == other


def test_a_saved_format_hides_no_column(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"number": list(range(100)), "text": sentences(100)})
    rows.with_format("numpy", columns=["number"]).save_to_disk(tmp_path / "data")
    documents = read_dataset(str(tmp_path / "data"), 10**9)
    assert "\n".join(documents).splitlines() == sentences(100)


def test_the_train_split_is_read_or_else_all_of_them(tmp_path: Path) -> None:
    splits = {
        name: datasets.Dataset.from_dict({"text": sentences(100, name)})
        for name in ("test", "train", "extra")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    found = read_dataset(str(tmp_path / "data"), 10**9)
    assert "\n".join(found).splitlines() == sentences(100, "train")
    found = read_dataset(str(tmp_path / "data" / "test"), 10**9)
    assert "\n".join(found).splitlines() == sentences(100, "test")
    del splits["train"]
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "untrained")
    found = read_dataset(str(tmp_path / "untrained"), 10**9)
    assert "\n".join(found).splitlines() == sentences(100, "test") + sentences(100, "extra")


def test_a_folder_of_data_files_is_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "files").mkdir()
    lines = [json.dumps({"text": row}) for row in sentences(100)]
    (tmp_path / "files" / "rows.jsonl").write_text("\n".join(lines))
    datasets.enable_progress_bars()
    found = read_dataset(str(tmp_path / "files"), 10**9)
    assert "\n".join(found).splitlines() == sentences(100)
    assert capfd.readouterr().err == ""
    assert datasets.is_progress_bar_enabled()


def test_a_name_is_read_from_the_local_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.txt").write_text("\n".join(sentences(100)))
    datasets.load_dataset(str(tmp_path / "mine"))
    (entry,) = (tmp_path / "cache" / "mine").iterdir()
    entry.rename(entry.parent / "default")  # as the configuration of a dataset of the hub
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("mine", "mine:default"):
        assert "\n".join(read_dataset(name, 10**9)).splitlines() == sentences(100)
    assert not caplog.records  # datasets would say that it could not ask the hub
    with pytest.raises(UsageError, match="mine:other"):
        read_dataset("mine:other", 10**9)


# Errors


@pytest.mark.parametrize("online", [True, False])
def test_no_such_dataset(monkeypatch: pytest.MonkeyPatch, online: bool) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", not online)
    with pytest.raises(UsageError, match=r"nobody/none.*load_dataset\('nobody/none'\)") as error:
        read_dataset("nobody/none", 1000)
    assert "Offline" in str(error.value)  # nothing was asked of the hub
    assert datasets.config.HF_HUB_OFFLINE is not online


def test_the_command_for_a_dataset_of_the_hub_names_the_configuration() -> None:
    with pytest.raises(UsageError, match=r"load_dataset\('nobody/none', 'small'\)"):
        read_dataset("nobody/none:small", 1000)


@pytest.mark.parametrize("name", ["", "data.jsonl", "missing"])
def test_what_holds_no_dataset_is_refused_without_a_hint_at_the_hub(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / name
    if name == "data.jsonl":
        path.write_text(json.dumps({"text": "word"}))
    with pytest.raises(UsageError, match="save_to_disk") as error:
        read_dataset(str(path), 1000)
    assert "hub" not in str(error.value).partition("Expected")[2]


def test_no_column_of_strings_names_the_columns(tmp_path: Path) -> None:
    path = saved(tmp_path / "data", label=[1, 2], text=[["a"], ["b"]])
    with pytest.raises(UsageError, match="its columns: label, text"):
        read_dataset(path, 1000)


def test_splits_that_differ_are_named(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": sentences(9)})
    other = datasets.Dataset.from_dict({"line": sentences(9)})
    datasets.DatasetDict({"a": one, "b": other}).save_to_disk(tmp_path / "data")
    with pytest.raises(UsageError, match="splits of the dataset"):
        read_dataset(str(tmp_path / "data"), 1000)


@pytest.mark.parametrize("rows", [["", None], ["few words"]])
def test_too_little_text_names_column_and_dataset(tmp_path: Path, rows: list[Any]) -> None:
    features = datasets.Features({"line": datasets.Value("string")})
    datasets.Dataset.from_dict({"line": rows}, features).save_to_disk(tmp_path / "data")
    with pytest.raises(UsageError, match=r"column 'line' of the dataset .*data has"):
        read_dataset(str(tmp_path / "data"), 1000)


def test_an_empty_saved_dataset_is_called_so(tmp_path: Path) -> None:
    path = saved(tmp_path / "data", text=[])  # which datasets 5.2 itself cannot load
    with pytest.raises((UsageError, IncompatibleInputError), match=r"empty|too few"):
        read_dataset(path, 1000)


@pytest.mark.parametrize("file", ["state.json", "data-00000-of-00001.arrow"])
def test_a_damaged_dataset_is_named(tmp_path: Path, file: str) -> None:
    path = Path(saved(tmp_path / "data", text=sentences(100))) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(IncompatibleInputError, match=r"data is damaged or empty .*Save it again"):
        read_dataset(str(tmp_path / "data"), 1000)


def test_without_datasets_the_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "datasets" else original(name, package)

    monkeypatch.setattr(_support.importlib.util, "find_spec", find_spec)
    with pytest.raises(MissingDependencyError, match=r"run: pip install datasets$"):
        read_dataset(str(tmp_path), 1000)


def test_a_text_and_a_dataset_exclude_each_other() -> None:
    with pytest.raises(UsageError, match=r"Expected one of the two"):
        load_task("hf:folder?text=a&dataset=b")


# The task


@needs_transformers
@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_short_rows_give_the_task_full_rows_of_tokens(tmp_path: Path, kind: str) -> None:
    folder = save_tiny(tmp_path / "model", kind)
    rows = [f"word{i * i % 97} word{i % 89} word{i % 7}" for i in range(8000)]
    task = load_task(f"hf:{folder}?dataset={saved(tmp_path / 'data', text=rows)}")
    assert isinstance(task, HFTask)
    assert [batch["input_ids"].shape for batch in task.calibration()] == [(2, 64)] * 4
    assert [batch["input_ids"].shape for batch in task._evaluation] == [(2, 64)] * 8
    assert next(task.train_batches(0))["input_ids"].shape == (4, 64)
    value = task.evaluate(task.model())
    assert 50 < value < 200 if kind == "causal" else value == pytest.approx(0, abs=1e-5)


@needs_transformers
def test_the_cap_grows_with_the_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model", "causal")
    limits: list[int] = []

    def read(name: str, limit: int) -> list[str]:
        limits.append(limit)
        return sentences(64)

    monkeypatch.setattr("blast_search.tasks.hf.read_dataset", read)
    HFTask(folder, dataset="name")
    HFTask(folder, dataset="name", evaluation=(64, 2048))
    assert limits == [CHARACTERS, 4 * 64 * 2048 * PER_TOKEN]
