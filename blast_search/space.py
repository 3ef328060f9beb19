"""What may be chosen: layers, candidates, and the search space that joins them (no torch)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from importlib import resources
from pathlib import Path
from typing import Any

from blast_search.errors import FallbackWarning, IncompatibleInputError, UsageError
from blast_search.files import read_yaml_mapping


@dataclass(frozen=True, order=True)
class Candidate:
    """One way to store a weight: b x b blocks of rank r, or dense (b = r = 0).

    b = 1 is plain low rank.
    """

    num_blocks: int
    rank: int

    @property
    def is_dense(self) -> bool:
        return self.num_blocks == 0

    @property
    def key(self) -> str:
        """Short name used in tables: "dense" or, for instance, "b4r128"."""
        return "dense" if self.is_dense else f"b{self.num_blocks}r{self.rank}"

    def params(self, m: int, n: int) -> int:
        """Parameters of an m x n weight (bias excluded): m n, or r (m + n + b^2)."""
        return m * n if self.is_dense else self.rank * (m + n + self.num_blocks**2)

    @classmethod
    def from_key(cls, key: str) -> Candidate:
        if key == "dense":
            return DENSE
        head, _, rank = key.partition("r")
        if head.startswith("b") and head[1:].isdecimal() and rank.isdecimal():
            candidate = cls(int(head[1:]), int(rank))
            if candidate.key == key and candidate.num_blocks and candidate.rank:
                return candidate
        raise IncompatibleInputError(f'"{key}" is no candidate, expected "dense" or "b4r128".')


DENSE = Candidate(0, 0)


@dataclass(frozen=True)
class Call:
    """One call of a layer per model call: `tokens` input vectors, in a workload of `weight`."""

    tokens: int
    weight: float = 1.0
    workload: str = ""


@dataclass(frozen=True)
class LayerSpec:
    """A weight of shape (out_features, in_features) that may be replaced."""

    name: str
    in_features: int
    out_features: int
    bias: bool
    calls: tuple[Call, ...]
    aliases: tuple[str, ...] = ()  # other paths of the same module; they share the choice
    tie: str = ""  # layers of one tie share the choice; "" for a layer on its own

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def type_name(self) -> str:
        """The path without its numbers: layers of one type play one part in every block."""
        return ".".join(part for part in self.name.split(".") if not part.isdecimal())

    def params(self, candidate: Candidate) -> int:
        """Weight parameters (bias excluded)."""
        return candidate.params(*self.shape)

    def macs(self, candidate: Candidate) -> float:
        """Multiply-adds per model call, weighted over workloads; one per parameter and token."""
        return self.params(candidate) * sum(call.tokens * call.weight for call in self.calls)


@dataclass(frozen=True)
class SearchSpace:
    """Which layers are searched, and which (num_blocks, rank) each may take.

    Attributes:
        include, exclude: shell patterns over layer names; exclude wins.
        output_head: search the layer that produces the model's output as well.
        num_blocks: block counts b; one that does not divide both sides of a layer is left out
            for that layer.  b = 1 (low rank) and dense are always candidates.
        ties: patterns like those of `include`; layers that match one pattern and have equal shape
            share one choice.  "#" stands for a number that tied layers have in common:
            "*.#.attn.[qkv]" ties the three of every block, "*.attn.[qkv]" those of all blocks.
        keep: fractions of the dense layer's parameters; each gives the rank of a candidate.
        rank_multiple: ranks are rounded to a multiple of this (kernels prefer it).
        uniform: only plans with one b and one keep for all layers, as in the BLAST paper.
    """

    name: str = "default"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    output_head: bool = False
    ties: tuple[str, ...] = ()
    num_blocks: tuple[int, ...] = (1, 2, 4, 8)
    keep: tuple[float, ...] = (
        0.04, 0.07, 0.1, 0.14, 0.18, 0.22, 0.26, 0.3, 0.34, 0.38, 0.42, 0.48, 0.55, 0.63, 0.72,
        0.82,
    )  # fmt: skip
    rank_multiple: int = 8
    uniform: bool = False

    def selects(self, name: str) -> bool:
        """Whether the patterns let a layer of this name be searched."""
        return any(fnmatchcase(name, p) for p in self.include) and not any(
            fnmatchcase(name, p) for p in self.exclude
        )

    def tie(self, name: str, shape: tuple[int, int]) -> str:
        """Name of the tie that a layer belongs to: of the first pattern that matches, else ""."""
        for pattern in self.ties:
            match = re.fullmatch(translate(pattern).replace(r"\#", r"([0-9]+)"), name)
            if match:
                return " ".join([pattern, *match.groups(), f"{shape[0]}x{shape[1]}"])
        return ""

    def rank(self, layer: LayerSpec, num_blocks: int, keep: float) -> int:
        """The rank that keeps about `keep` of the layer's parameters; at least 1."""
        m, n = layer.shape
        exact = keep * m * n / (m + n + num_blocks**2)
        step = self.rank_multiple
        # A multiple of `step` that is too coarse for a small layer would collapse its grid.
        while step > 1 and exact < 2 * step:
            step //= 2
        return max(1, round(exact / step) * step)

    def fractions(self) -> list[float]:
        """What uniform plans may keep: from the largest `keep` down to 0.01 in steps of 0.01.

        From 0.1 on in relative steps of 0.01: absolute ones are a fifth of a plan that keeps 0.05,
        which would leave that much of a budget.
        """
        top = max(self.keep)
        found = [percent / 100 for percent in range(round(100 * top), 10, -1)] + [min(top, 0.1)]
        while found[-1] > 0.01:
            found.append(max(0.01, 0.99 * found[-1]))
        return found

    def uniform_choice(self, layer: LayerSpec, num_blocks: int, keep: float) -> Candidate:
        """What a uniform plan (one b, one keep) takes for this layer.

        Dense where b does not divide the layer, or where b and r would save no parameter.
        """
        m, n = layer.shape
        if m % num_blocks or n % num_blocks:
            return DENSE
        candidate = Candidate(num_blocks, self.rank(layer, num_blocks, keep))
        return candidate if layer.params(candidate) < m * n else DENSE

    def candidates(self, layer: LayerSpec) -> tuple[Candidate, ...]:
        """DENSE first, then every (b, r) that has fewer parameters than the dense layer."""
        found = {
            self.uniform_choice(layer, b, keep)
            for b in sorted({1, *self.num_blocks})
            for keep in self.keep
        }
        return (DENSE, *sorted(found - {DENSE}))

    def check(self, layers: Sequence[LayerSpec]) -> None:
        """A FallbackWarning if none of the block counts divides any of the layers.

        Raises:
            IncompatibleInputError: so in a uniform space, in which low rank is no candidate then.
        """
        if any(
            layer.in_features % b == 0 and layer.out_features % b == 0
            for layer in layers
            for b in self.num_blocks
        ):
            return
        shapes = ", ".join(sorted({f"{m} x {n}" for m, n in (ly.shape for ly in layers)}))
        text = (
            f"num_blocks {list(self.num_blocks)} of space '{self.name}' divides none of the "
            f"{len(layers)} layers ({shapes})"
        )
        if self.uniform:
            raise IncompatibleInputError(
                f"{text}. Choose block counts that divide both sides; 1 (low rank) always does."
            )
        warnings.warn(
            f"{text}: only low rank (b = 1) and dense are searched. Choose block counts that "
            "divide both sides to have others.",
            FallbackWarning,
            stacklevel=2,
        )


def ties_of(layers: Iterable[LayerSpec]) -> dict[str, str]:
    """Layer name -> tie, for the layers that share their choice with others."""
    return {layer.name: layer.tie for layer in layers if layer.tie}


def _strings(value: Any) -> tuple[str, ...] | None:
    value = [value] if isinstance(value, str) else value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return None


def _counts(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, list) and value and all(type(b) is int and 1 <= b <= 256 for b in value):
        return tuple(sorted(set(value)))
    return None


def _fractions(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, list) and value and all(type(f) in (int, float) for f in value):
        fractions = tuple(sorted({float(f) for f in value}))
        if fractions[0] > 0 and fractions[-1] < 1:
            return fractions
    return None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value >= 1 else None


@dataclass(frozen=True)
class _Field:
    parse: Any
    expected: str


_FIELDS = {
    "include": _Field(_strings, "a list of name patterns"),
    "exclude": _Field(_strings, "a list of name patterns"),
    "output_head": _Field(_flag, "true or false"),
    "ties": _Field(_strings, "a list of name patterns"),
    "num_blocks": _Field(_counts, "a list of whole numbers from 1 to 256"),
    "keep": _Field(_fractions, "a list of numbers between 0 and 1 (both excluded)"),
    "rank_multiple": _Field(_positive, "a whole number of at least 1"),
    "uniform": _Field(_flag, "true or false"),
}


def parse_space(values: dict[str, Any], name: str) -> SearchSpace:
    """A SearchSpace from YAML values.

    Raises:
        IncompatibleInputError: an unknown key or a value of the wrong kind, by name.
    """
    fields: dict[str, Any] = {}
    for key, value in values.items():
        if key not in _FIELDS:
            raise IncompatibleInputError(
                f"search space {name}: unknown key '{key}', expected {', '.join(_FIELDS)}."
            )
        fields[key] = _FIELDS[key].parse(value)
        if fields[key] is None:
            raise IncompatibleInputError(
                f"search space {name}: {key} is {value!r}, expected {_FIELDS[key].expected}."
            )
    return SearchSpace(name=name, **fields)


def space_values(space: SearchSpace) -> dict[str, Any]:
    """What `parse_space` makes the space of."""
    values = {key: getattr(space, key) for key in _FIELDS}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def kept_space(run: Path, name: str) -> SearchSpace:
    """The space that a run was started with: its file may have changed since, or be gone.

    Args:
        name: as `load_space` takes it, for a run folder without a space.yaml (an older one).
    """
    file = run / "space.yaml"
    if not file.is_file():
        return load_space(name)
    return parse_space(read_yaml_mapping(file), Path(name).stem)


def shipped_spaces() -> dict[str, Path]:
    """Name -> file of the spaces that come with the package (also from a wheel)."""
    installed = Path(str(resources.files("blast_search"))) / "search_spaces"
    folder = installed if installed.is_dir() else installed.parent.parent / "search_spaces"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_space(space: str | Path) -> SearchSpace:
    """Load a search space by file path, or by the name of a shipped one ("default").

    Raises:
        UsageError: no such file or name.
        IncompatibleInputError: broken YAML, an unknown key, a wrong value.
    """
    shipped = shipped_spaces()
    path = Path(space)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        if str(space) not in shipped:
            raise UsageError(
                f"search space '{space}' not found, expected one of {', '.join(shipped)} "
                "or a YAML file."
            )
        path = shipped[str(space)]
    if not path.is_file():
        raise UsageError(f"search space file {path} does not exist. Check the path.")
    return parse_space(read_yaml_mapping(path), path.stem)


__all__ = [
    "DENSE", "Call", "Candidate", "LayerSpec", "SearchSpace", "kept_space", "load_space",
    "parse_space", "shipped_spaces", "space_values", "ties_of",
]  # fmt: skip
