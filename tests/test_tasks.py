"""Tasks: disjoint splits, the Protocol, how a task is named, and what is said when one is not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from blast_search.errors import IncompatibleInputError, MissingDependencyError, UsageError
from blast_search.evaluate import Task, workloads_of
from blast_search.tasks import BUILTIN, _support, check_task, load_task, minilm, smollm2, vit
from blast_search.tasks._text import (
    read_documents,
    split_documents,
    token_rows,
    wikipedia,
)
from blast_search.tasks.hf import HFTask


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_minilm = needs(minilm.PACKAGE, "transformers")
needs_smollm2 = needs(smollm2.PACKAGE, "transformers", "gguf", "accelerate")
needs_transformers = needs("transformers")


# Data


def test_wordnet_entries_are_unique_and_enough() -> None:
    lemmas, definitions = zip(*minilm.entries(), strict=True)
    assert len(set(lemmas)) == len(lemmas)
    assert len(set(definitions)) == len(definitions)
    assert len(lemmas) - minilm.EVALUATION - minilm.CALIBRATION >= 25_000


@needs_minilm
def test_minilm_splits_are_disjoint() -> None:
    task = minilm.task()
    parts = [task.calibration_entries, task.evaluation_entries, task.training_entries]
    assert [len(part) for part in parts[:2]] == [512, 4000]
    for one, other in combinations(parts, 2):
        for column in (0, 1):
            assert not {row[column] for row in one} & {row[column] for row in other}


def test_wikipedia_splits_are_disjoint_and_complete() -> None:
    splits = split_documents(wikipedia())
    for one, other in combinations(splits, 2):
        assert not set(one) & set(other)
    assert sum(map(len, splits)) == len(wikipedia())
    assert len(splits.evaluation) >= 16
    assert len(splits.calibration) >= 8


@pytest.mark.parametrize("separator", ["\n", " "])
def test_text_file_is_cut_without_loss_or_overlap(tmp_path: Path, separator: str) -> None:
    words = [f"word{i}" for i in range(5000)]
    path = tmp_path / "text.txt"
    path.write_text(separator.join(words))
    splits = split_documents(read_documents(path))
    found = [set(" ".join(part).split()) for part in splits]
    assert set().union(*found) == set(words)
    assert all(not one & other for one, other in combinations(found, 2))


@pytest.mark.parametrize("content", [b"", b"short", b"\xff\xfe\x00bad"])
def test_bad_text_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"text\.txt"):
        read_documents(path)


def test_token_rows_go_round_the_documents() -> None:
    documents = ["aaaaaa", "bbbbbbbbbb", "cc"]
    rows = token_rows(documents, lambda text: [ord(c) for c in text], 3)
    assert ["".join(map(chr, row)) for row in rows] == ["aaa", "bbb", "aaa", "bbb", "bbb"]
    assert len(token_rows(documents, lambda text: [ord(c) for c in text], 3, 2)) == 2
    joined = token_rows(["ab", "cd"], lambda text: [ord(c) for c in text], 3)
    assert joined == [[ord(c) for c in "abc"]]


def test_fashion_splits_are_disjoint() -> None:
    parts = vit.images()
    hashes = {
        name: {picture.numpy().tobytes() for picture in pictures}
        for name, (pictures, _) in parts.items()
    }
    for one, other in combinations(hashes.values(), 2):
        assert not one & other
    assert len(parts["evaluation"][1]) == 3000
    assert all(pictures.shape[1:] == (1, 28, 28) for pictures, _ in parts.values())


# Naming a task


def test_importing_the_tasks_imports_no_model_library() -> None:
    code = "import sys, blast_search.tasks; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "spec", ["", "minilmm", "no.such.module:task", "json:", ":task", "json:no_such", "hf:",
             "hf:folder?text=a&other=b", "hf:folder?dataset=", "hf:folder?text=a&dataset=b"],
)  # fmt: skip
def test_unknown_names_are_usage_errors(spec: str) -> None:
    with pytest.raises(UsageError) as error:
        load_task(spec)
    message = str(error.value)
    assert "Expected" in message
    assert len(message.splitlines()) <= 3


def test_unknown_name_lists_the_names_and_forms() -> None:
    with pytest.raises(UsageError, match=r"pkg\.module:function") as error:
        load_task("resnet")
    assert all(name in str(error.value) for name in ("'resnet'", *BUILTIN))


MY_TASK = """
    import torch
    from torch import nn

    class Mine:
        name = "mine"
        metric = ("error", False)
        def model(self): return nn.Linear(4, 4).eval()
        def workload(self): return torch.zeros(8, 4)
        def calibration(self): return [torch.zeros(8, 4)]
        def evaluate(self, model): return 0.0
        def train_batches(self, seed):
            while True:
                yield torch.zeros(8, 4)
        def loss(self, model, batch, teacher): return model(batch).square().mean()

    class Half:
        name = "half"
        metric = ("error", False)
        def model(self): return nn.Linear(4, 4)

    def task(): return Mine()
    def nothing(): return None
    def half(): return Half()
    def klass(): return Mine
    def asks(argument): return Mine()
"""


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "my_blast_task"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MY_TASK))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_a_function_in_the_current_folder_is_a_task(my_module: str) -> None:
    task = load_task(f"{my_module}:task")
    assert isinstance(task, Task)
    assert task.name == "mine"


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        ("nothing", "calibration"),
        ("half", "workload, calibration, evaluate"),
        ("klass", "class"),
        ("asks", "argument"),
    ],
)
def test_what_is_no_task_is_named(my_module: str, function: str, missing: str) -> None:
    with pytest.raises(UsageError, match=missing):
        load_task(f"{my_module}:{function}")


def test_a_module_that_is_not_python_is_named(my_module: str) -> None:
    Path("broken.py").write_text("def task(:\n")
    with pytest.raises(UsageError, match="broken"):
        load_task("broken:task")


def test_a_task_that_needs_a_package_says_which(my_module: str) -> None:
    Path("needy.py").write_text("import no_such_package_here\n")
    with pytest.raises(MissingDependencyError) as error:
        load_task("needy:task")
    assert "imports the module no_such_package_here, which is not installed" in str(error.value)
    # PIL, cv2 and sklearn are modules of packages with other names.
    assert "pip install PACKAGE, the package that holds it" in str(error.value)


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        ("./mine.py:task", "Give mine:task."),
        ("mine.py:task", "Give mine:task."),
        ("folder/mine.py:task", "Give folder.mine:task."),
        ("folder/mine:task", "Give folder.mine:task."),
        (".mine:task", "Give mine:task."),
        ("../mine.py:task", "Give mine:task, and call it from the folder ..."),
        ("/some/mine.py:task", "Give mine:task, and call it from the folder /some."),
    ],
)
def test_the_path_of_a_file_is_told_from_the_name_of_a_module(spec: str, advice: str) -> None:
    with pytest.raises(UsageError, match="is the path of a file, expected a module's name") as e:
        load_task(spec)
    assert str(e.value).endswith(advice)


@pytest.mark.parametrize("module", [minilm, smollm2])
def test_a_missing_package_gives_the_command(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    original = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == module.PACKAGE else original(name, package)

    monkeypatch.setattr(_support.importlib.util, "find_spec", find_spec)
    with pytest.raises(MissingDependencyError) as error:
        load_task(module.__name__.rpartition(".")[2])
    assert module.INSTALL in str(error.value)
    assert "\n" not in str(error.value)


# Workloads of a task


def test_an_object_is_checked_as_what_a_function_returns() -> None:
    methods = dict.fromkeys(("model", "workload", "calibration", "evaluate", "train_batches"), int)
    partial = SimpleNamespace(name="some", metric=("m", True), **methods)
    with pytest.raises(UsageError, match="the task 'some' is SimpleNamespace, without: loss"):
        check_task("some", partial)
    whole = SimpleNamespace(**vars(partial), loss=int)
    assert check_task("some", whole) is whole
    whole.metric = ["m", False]  # as read from a file
    assert check_task("some", whole) is whole
    for metric in (("perplexity", "min"), ("m", 0), ("m",), "ab", (True, "m"), None):
        whole.metric = metric
        with pytest.raises(UsageError, match=r"without: metric \(a pair such as"):
            check_task("some", whole)


def test_a_plus_in_the_name_of_a_file_is_a_plus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blast_search.tasks.hf.HFTask", lambda *values: values)
    assert load_task("hf:m+n?text=a+b.txt") == ("m+n", "a+b.txt", None)
    assert load_task("hf:m?text=a%20b.txt") == ("m", "a b.txt", None)


def workload_task(workload: Any) -> Any:
    return SimpleNamespace(name="mine", workload=lambda: workload)


def test_named_workloads_of_a_task() -> None:
    x = torch.zeros(2, 3)
    for weight in (2, 2.0, np.float32(2)):
        (only,) = workloads_of(workload_task({"a": ((x, x), weight)}))
        assert (only.name, only.weight, len(only.batch)) == ("a", 2.0, 2)
    (whole,) = workloads_of(workload_task({"input": x}))  # a batch, called as model(input=x)
    assert whole.name == "default"


@pytest.mark.parametrize(
    ("pair", "got"),
    [
        ((torch.zeros(2), 1.0, "extra"), "'a' a tuple of 3"),
        ((torch.zeros(2),), "'a' a tuple of 1"),
        ((torch.zeros(2), 0), "weight 0"),
        ((torch.zeros(2), -1.5), r"weight -1\.5"),
        ((torch.zeros(2), float("nan")), "weight nan"),
        ((torch.zeros(2), float("inf")), "weight inf"),
        ((torch.zeros(2), "1"), "weight a str"),
        ((torch.zeros(2), torch.zeros(2)), "weight a Tensor"),
    ],
)
def test_workloads_without_a_usable_weight_are_refused(pair: Any, got: str) -> None:
    with pytest.raises(IncompatibleInputError, match=f"task mine.*{got}.*expected"):
        workloads_of(workload_task({"b": (torch.zeros(2), 1.0), "a": pair}))


# Behaviour


def test_mean_reciprocal_rank_counts_ties_and_nan_against_the_model() -> None:
    keys = torch.eye(4)
    assert minilm.mean_reciprocal_rank(keys, keys) == 1.0
    assert minilm.mean_reciprocal_rank(torch.ones(4, 4), torch.ones(4, 4)) == 0.25
    assert minilm.mean_reciprocal_rank(torch.full((4, 4), torch.nan), keys) == 0.25
    assert minilm.mean_reciprocal_rank(keys[[1, 0, 2, 3]], keys) == pytest.approx(0.625, abs=0.13)


@needs_minilm
def test_minilm_task_works_on_a_small_subset() -> None:
    task = minilm.MiniLMTask(evaluation_size=32)
    assert isinstance(task, Task)
    model, teacher = task.model(), task.model()
    assert not model.training
    assert next(model.parameters()) is not next(teacher.parameters())
    assert model(**task.workload()).shape == (32, 384)
    assert task.make_workload(3, 17)["input_ids"].shape == (3, 17)
    assert sum(len(batch["input_ids"]) for batch in task.calibration()) == 1024
    dense = task.evaluate(model)
    assert dense == task.evaluate(model)
    assert 0.6 < dense < 1
    assert task.evaluate(model.bfloat16()) == pytest.approx(dense, abs=0.05)
    batch = next(task.train_batches(1))
    again = next(task.train_batches(1))
    assert torch.equal(batch[0]["input_ids"], again[0]["input_ids"])
    assert abs(float(task.loss(teacher, batch, teacher).detach())) < 1e-4


@pytest.fixture
def small_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> vit.ViTTask:
    """Two steps of training, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pictures, labels = vit.images()["training"]
    few = {**vit.images(), "training": (pictures[:64], labels[:64])}
    monkeypatch.setattr(vit, "images", lambda: few)
    return vit.ViTTask(vit.Recipe(width=16, depth=1, hidden=32, epochs=2, batch_size=32))


def test_vit_is_trained_once_and_the_same_each_time(
    small_vit: vit.ViTTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = small_vit.model()
    assert "training the ViT" in capsys.readouterr().err
    files = list((tmp_path / "blast-search").iterdir())
    assert [path.suffix for path in files] == [".safetensors"]
    small_vit.model()
    assert "training the ViT" not in capsys.readouterr().err
    files[0].unlink()
    second = small_vit.model()
    assert all(
        torch.equal(one, other)
        for one, other in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_damaged_vit_cache_is_named(small_vit: vit.ViTTask) -> None:
    path = vit.trained_file(small_vit.recipe)
    path.write_bytes(b"damaged")
    with pytest.raises(IncompatibleInputError, match=path.name):
        small_vit.model()


def test_vit_task_works(small_vit: vit.ViTTask) -> None:
    small_vit.batch_size = 32
    assert isinstance(small_vit, Task)
    model = small_vit.model()
    assert model(small_vit.workload()).shape == (128, 10)
    assert small_vit.workload().shape[0] * 16 >= 1000
    assert 0 <= small_vit.evaluate(model) <= 1
    batch = next(small_vit.train_batches(0))
    loss = small_vit.loss(model, batch, small_vit.model())
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.ndim == 0


def test_vit_counts_nan_as_wrong(small_vit: vit.ViTTask) -> None:
    model = small_vit.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert small_vit.evaluate(model) == 0


def save_tiny(folder: Path, kind: str) -> str:
    """A random two-layer model and a word tokenizer, saved as a user's folder would be."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"word{i}": i + 1 for i in range(99)} | {"[UNK]": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]"
    ).save_pretrained(folder)
    sizes = {
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    model: nn.Module
    if kind == "causal":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    elif kind == "decoder classifier":
        config = transformers.LlamaConfig(**sizes, num_labels=3)
        model = transformers.LlamaForSequenceClassification(config)
    elif kind == "classifier":
        config = transformers.BertConfig(**sizes, num_labels=3)
        model = transformers.BertForSequenceClassification(config)
        with torch.no_grad():
            model.classifier.weight.mul_(50)  # as initialised, all classes are as likely
    else:
        model = transformers.BertModel(transformers.BertConfig(**sizes))
    model.save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


@needs_transformers
@pytest.mark.parametrize("kind", ["causal", "encoder", "classifier"])
def test_hugging_face_folder_is_a_task(tmp_path: Path, kind: str) -> None:
    folder = save_tiny(tmp_path / "model", kind)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"word{i * i % 97} word{i % 89} word{i % 7}" for i in range(4000)))
    task = load_task(f"hf:{folder}?text={text}")
    assert isinstance(task, Task)
    model, teacher = task.model(), task.model()
    ids = [batch["input_ids"] for batch in task.calibration()]
    assert ids[0].shape == (2, 64)
    assert task.workload()["input_ids"].shape == (1, 128)
    value = task.evaluate(model)
    if kind == "causal":
        assert task.metric == ("perplexity", False)
        assert 50 < value < 200
    else:
        metric = "divergence" if kind == "classifier" else "feature_distance"
        assert task.metric == (metric, False)
        assert value == pytest.approx(0, abs=1e-5)
    assert hasattr(model, "classifier") == (kind == "classifier")
    batch = next(task.train_batches(0))
    assert float(task.loss(model, batch, teacher).detach()) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        next(model.parameters()).mul_(-1)
    assert float(task.loss(model, batch, teacher).detach()) > 1e-4


@needs_transformers
def test_weights_that_a_checkpoint_lacks_are_not_drawn(tmp_path: Path) -> None:
    """Every model() would be another one."""
    folder = Path(save_tiny(tmp_path / "model", "causal"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(IncompatibleInputError, match=r"lack 1 tensors .*1\.mlp\.down_proj"):
        HFTask(folder).model()


@needs_transformers
@pytest.mark.parametrize("template", ["$A [E]", "[B] $A", "[B] $A [E]", "$A"])
def test_rows_have_the_special_tokens_where_the_tokenizer_puts_them(
    tmp_path: Path, template: str
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = Path(save_tiny(tmp_path / "model", "classifier"))
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("[B]", 98), ("[E]", 99)]
    )
    tokenizer.save(str(file))
    text = tmp_path / "text.txt"
    text.write_text("\n".join("word5 word6 word7 word8" for _ in range(4000)))
    row = HFTask(folder, text).calibration()[0]["input_ids"][0].tolist()
    assert len(row) == 64
    assert [row[0] == 98, row[-1] == 99] == ["[B]" in template, "[E]" in template]
    assert sum(token in (98, 99) for token in row) == template.count("[")


@needs_transformers
def test_a_classifier_that_looks_for_the_last_token_gets_its_rows(tmp_path: Path) -> None:
    """Decoders do, and without a padding token they refuse more than one row."""
    task = HFTask(save_tiny(tmp_path / "model", "decoder classifier"))
    assert task.metric == ("divergence", False)
    batch = task.calibration()[0]
    assert batch["input_ids"].shape == (2, 64)
    assert task.model()(**batch).logits.shape == (2, 3)


@needs_transformers
def test_an_encoder_whose_pooler_was_not_saved_has_none(tmp_path: Path) -> None:
    folder = Path(save_tiny(tmp_path / "model", "encoder"))
    task = HFTask(folder)
    assert task.model().pooler is not None
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert task.model().pooler is None


@needs_transformers
def test_no_such_hugging_face_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hf download"):
        load_task(f"hf:{tmp_path / 'none'}")


@pytest.mark.slow
@needs_smollm2
def test_smollm2_perplexity() -> None:
    task = smollm2.task()
    model = task.model()
    assert sum(batch["input_ids"].numel() for batch in task._evaluation) == 16 * 512
    assert model(**task.workload()).logits.shape[:2] == (1, 128)
    assert 14 < task.evaluate(model) < 18
