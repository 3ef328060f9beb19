"""Ready task for a Hugging Face model of texts: causal, an encoder, or one with a known head.

Needs transformers.  Models are read from a folder, or by name from the local download cache;
nothing is downloaded, no code from the model folder runs, and only safetensors are read.  A
dataset needs datasets, and is read from a folder or from the local cache, too.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from blast_search.batches import to_device
from blast_search.errors import IncompatibleInputError, UsageError
from blast_search.outputs import divergence, output_tensors
from blast_search.tasks._dataset import read_dataset
from blast_search.tasks._support import quiet_transformers, require
from blast_search.tasks._text import (
    Splits,
    read_documents,
    split_documents,
    token_rows,
    wikipedia,
)

INSTALL = "pip install transformers"
# Loaders of transformers.  Of these heads it is known that one text is all their input.
BARE, CAUSAL = "AutoModel", "AutoModelForCausalLM"
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
TEXTS = BARE + HEADS[0]
FEATURES = "features"
# Rows x tokens.  A classifier of texts has one output for each row: more rows, shorter ones.
SHAPES = {"evaluation": (16, 512), "calibration": (8, 256), "training": (4, 128)}
TEXT_SHAPES = {"evaluation": (256, 64), "calibration": (64, 64), "training": (32, 64)}
CHARACTERS = 2_000_000  # of a dataset that are read, or
PER_TOKEN = 16  # for each token of the shapes where that is more: rows leave ends over

Batch = dict[str, Tensor]


class Shape(NamedTuple):
    """Rows x tokens."""

    rows: int
    length: int


class HFTask:
    """A text model and its text.

    Causal language models are judged by perplexity and trained on the dense model's logits.
    Classifiers of texts or tokens and question answering models keep their head: they are judged
    by, and trained on, the divergence of their outputs from the dense model's (outputs.py).
    Other encoders are loaded without a head and judged by feature distance, the mean of
    1 - cosine between their last hidden states and the dense model's, and trained on the same.

    Args:
        model_name_or_path: a folder written by save_pretrained, or a name in the local cache.
        text_file: UTF-8 text, split into disjoint parts for evaluation, calibration and
            training; None takes the Wikipedia extract that ships with blast_search, unless there
            is a dataset.
        dataset: in place of a text file, text from a dataset of Hugging Face datasets, split in
            the same way: a folder written by save_to_disk, a folder of data files, or a name (or
            name:configuration) in the local cache.  Of several splits "train" is read (all, where
            none has that name; name the folder of one to read that), of several columns "text"
            (the first of strings, where none has that name).  Consecutive rows are joined into 64
            documents from all over the dataset, of 2 million characters in all at most (or 16 for
            each token that the shapes below ask for, where that is more).
        name: of the task in reports.
        evaluation, calibration: rows x tokens in all; training, and the workload: per batch.
            Without a value: SHAPES, or for a classifier of texts TEXT_SHAPES.

    Raises:
        MissingDependencyError: transformers, or datasets for a dataset, is not installed.
        UsageError: no such model, text or dataset, both a text and a dataset, a dataset without a
            column of strings, an encoder-decoder model, or too little text.
        IncompatibleInputError: a saved dataset is damaged.
    """

    train_steps = 40
    # smollm2 at half the latency, perplexity 414 before and after 20 steps: 185 with 3e-5, 147
    # with 1e-4, 163 with 3e-4 (its loss rises first).
    learning_rate = 1.5e-4

    def __init__(
        self,
        model_name_or_path: str | Path,
        text_file: str | Path | None = None,
        dataset: str | Path | None = None,
        *,
        name: str | None = None,
        evaluation: tuple[int, int] | None = None,
        calibration: tuple[int, int] | None = None,
        training: tuple[int, int] | None = None,
        workload: tuple[int, int] = (1, 128),
    ) -> None:
        if text_file is not None and dataset is not None:
            raise UsageError(
                f"got the text file {text_file} and the dataset {dataset}. Expected one of the "
                "two; leave out text= or dataset=."
            )
        require("hf", INSTALL, "transformers")
        self.source = str(model_name_or_path)
        self.name = name or f"hf-{Path(self.source).name}"
        self._loader = self._find_loader()
        self.causal = self._loader == CAUSAL
        shapes = TEXT_SHAPES if self._loader == TEXTS else SHAPES
        self.evaluation_shape = Shape(*(evaluation or shapes["evaluation"]))
        self.calibration_shape = Shape(*(calibration or shapes["calibration"]))
        self.training_shape = Shape(*(training or shapes["training"]))
        self.workload_shape = Shape(*workload)
        if dataset is not None:
            documents = read_dataset(str(dataset), self._characters())
        else:
            documents = wikipedia() if text_file is None else read_documents(Path(text_file))
        self.splits: Splits = split_documents(documents)
        self.metric = (
            {CAUSAL: "perplexity", BARE: "feature_distance"}.get(self._loader, "divergence"),
            False,
        )
        # What the model is loaded without: a pooler that was not saved; a random one says nothing.
        self._without: dict[str, Any] = {}
        self._reference: list[dict[str, Tensor]] = []  # what the dense model is judged by

    def folder(self) -> str:
        """Where the model is: a folder, or a name in the local cache."""
        return self.source

    def _characters(self) -> int:
        """How much of a dataset is read: enough for the shapes, whose splits are parts of it."""
        tokens = max(
            4 * math.prod(self.evaluation_shape),
            8 * math.prod(self.calibration_shape),
            2 * self.train_steps * math.prod(self.training_shape),
        )
        return max(CHARACTERS, PER_TOKEN * tokens)

    def _find_loader(self) -> str:
        """The class of transformers that loads the model, with the head that it has."""
        config = self._config
        kinds = [str(kind) for kind in getattr(config, "architectures", None) or []]
        if getattr(config, "is_encoder_decoder", False):
            raise UsageError(
                f"the model {self.source} is an encoder-decoder. Expected a causal language model "
                "or an encoder; write a task of your own for it (pkg.module:function)."
            )
        if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
            return CAUSAL
        return next((BARE + head for head in HEADS if any(k.endswith(head) for k in kinds)), BARE)

    def _load(self, loader: str, **options: Any) -> Any:
        folder = self.folder()
        with quiet_transformers():
            import transformers

            try:
                return getattr(transformers, loader).from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False, **options
                )
            except SafetensorError as error:
                raise IncompatibleInputError(
                    f"the weights of the model {self.source} are damaged ({error}). Download or "
                    "save them again."
                ) from error
            except (OSError, ValueError) as error:
                first = str(error).strip().splitlines()[0]
                raise UsageError(
                    f"cannot load the model {self.source} ({loader}: {first}). Expected a folder "
                    "of a text model written by save_pretrained (safetensors and tokenizer); for "
                    f"a model of the hub, first run: hf download {self.source}. Other models need "
                    "a task of your own (pkg.module:function)."
                ) from error

    @cached_property
    def _config(self) -> Any:
        return self._load("AutoConfig")

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load("AutoTokenizer")

    def model(self) -> nn.Module:
        """A new model: fp32, CPU, eval mode, no key/value cache."""
        config = copy.deepcopy(self._config)
        config.use_cache = False
        options = {"config": config, "dtype": torch.float32, "use_safetensors": True}
        model: nn.Module
        options |= self._without
        model, found = self._load(self._loader, output_loading_info=True, **options)
        if any("pooler" in key for key in found["missing_keys"]):
            self._without = {"add_pooling_layer": False}
            return self.model()
        parameters = dict(model.named_parameters())
        if missing := sorted(key for key in found["missing_keys"] if key in parameters):
            raise IncompatibleInputError(
                f"the weights of the model {self.source} lack {len(missing)} tensors that its "
                f"{type(model).__name__} has ({', '.join(missing[:3])}): they would be random. "
                "Save the whole model with save_pretrained, or write a task of your own for it "
                "(pkg.module:function)."
            )
        if self._loader == TEXTS and getattr(config, "pad_token_id", None) is None:
            # A decoder's classifier looks for the last token that is no padding; rows are full.
            model.config.pad_token_id = -1  # type: ignore[union-attr]
        return model.eval()

    def workload(self) -> Batch:
        """1 x 128 tokens unless the task was made with another shape."""
        return self.make_workload(*self.workload_shape)

    def make_workload(self, batch_size: int, length: int) -> Batch:
        """batch_size rows of exactly length tokens, without padding."""
        rows = self._rows(self.splits.calibration, Shape(batch_size, length), fill=True)
        return self._batch(rows)

    def calibration(self) -> list[Batch]:
        """Rows of the calibration documents, two to a batch."""
        rows = self._rows(self.splits.calibration, self.calibration_shape)
        return [self._batch(rows[i : i + 2]) for i in range(0, len(rows), 2)]

    @cached_property
    def _evaluation(self) -> list[Batch]:
        rows = self._rows(self.splits.evaluation, self.evaluation_shape)
        return [self._batch(rows[i : i + 2]) for i in range(0, len(rows), 2)]

    def evaluate(self, model: nn.Module) -> float:
        """Perplexity, or the distance from the dense model, on the evaluation rows."""
        with torch.no_grad():
            return self._perplexity(model) if self.causal else self._distance(model)

    def _perplexity(self, model: nn.Module) -> float:
        total, count = 0.0, 0
        for batch in self._evaluation:
            moved = to_device(batch, model)
            logits = model(**moved).logits
            for row, ids in zip(logits, moved["input_ids"], strict=True):
                total += float(functional.cross_entropy(row[:-1].float(), ids[1:]).double()) * (
                    len(ids) - 1
                )
                count += len(ids) - 1
        return float(torch.tensor(total / count, dtype=torch.float64).exp())

    def _distance(self, model: nn.Module) -> float:
        if not self._reference:
            dense = self.model()
            self._reference = [self._judged(dense, batch) for batch in self._evaluation]
        distances = [
            float(self._apart(self._judged(model, batch), wanted, batch))
            for batch, wanted in zip(self._evaluation, self._reference, strict=True)
        ]
        return fmean(distances)

    def _judged(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What tells a model from the dense one: its outputs, or an encoder's features."""
        output = model(**to_device(batch, model))
        return {FEATURES: _features(output)} if self._loader == BARE else output_tensors(output)

    def _apart(self, found: dict[str, Tensor], wanted: dict[str, Tensor], batch: Batch) -> Tensor:
        if self._loader != BARE:
            return divergence(found, wanted, batch)
        features = found[FEATURES]
        return _distance(features, wanted[FEATURES].to(features.device))

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Endless batches of training rows (4 x 128 unless the task was made otherwise)."""
        size, length = self.training_shape
        rows = self._rows(self.splits.training, Shape(0, length))
        rng = random.Random(seed)
        while True:
            rng.shuffle(rows)
            for start in range(0, max(len(rows) - size, 0) + 1, size):
                yield self._batch(rows[start : start + size])

    def loss(self, model: nn.Module, batch: Batch, teacher: nn.Module) -> Tensor:
        """KL(teacher || model) in nats per token; or the distance by which it is judged."""
        with torch.no_grad():
            wanted = self._judged(teacher, batch)
        return self._apart(self._judged(model, batch), wanted, batch)

    def _rows(self, documents: list[str], shape: Shape, fill: bool = False) -> list[list[int]]:
        """Rows of the model's own form: special tokens first (and last, for an encoder)."""
        head, tail = self._special
        # A tokenizer knows of positions that a model has and cannot use (RoBERTa's).
        most = getattr(self._config, "max_position_embeddings", None) or shape.length
        longest = min(most, self._tokenizer.model_max_length)
        length = shape.length if fill else min(shape.length, longest)
        body = max(length - len(head) - len(tail), 1)
        if fill:  # a workload: any length, text repeated where it runs out
            tokens = [token for text in documents for token in self._encode(text)]
            tokens *= -(-shape.rows * body // len(tokens))
            rows = [tokens[i * body : (i + 1) * body] for i in range(shape.rows)]
        else:
            rows = token_rows(documents, self._encode, body, shape.rows or None)
        if not rows:
            raise UsageError(
                f"the text of task {self.name} has too few tokens for one row of {length}. "
                "Expected 100,000 characters or more; give a longer text."
            )
        return [(head + row + tail)[:length] for row in rows]

    @cached_property
    def _special(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before a text, and (for an encoder) after it."""
        word, whole = self._encode("the"), list(self._tokenizer("the")["input_ids"])
        at = next((k for k in range(len(whole)) if whole[k : k + len(word)] == word), 1)
        return whole[:at], [] if self.causal else whole[at + len(word) :]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids

    def _batch(self, rows: list[list[int]]) -> Batch:
        return {"input_ids": torch.tensor(rows)}  # full rows: no padding, hence no mask


def _features(output: Any) -> Tensor:
    """The last hidden state (B, T, width) of an encoder's output, in fp32."""
    hidden = output.get("last_hidden_state") if isinstance(output, Mapping) else None
    if not isinstance(hidden, Tensor):
        raise IncompatibleInputError(
            f"the encoder returned {type(output).__name__} without last_hidden_state; "
            "write a task of your own for it (pkg.module:function)."
        )
    return hidden.float()


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    return 1 - functional.cosine_similarity(found, wanted, dim=-1).mean()
