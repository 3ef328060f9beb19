"""The decision: which layer becomes what, with its evidence (plan.json, schema_version 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from blast_search.errors import IncompatibleInputError
from blast_search.files import read_json, sha256_json, write_json
from blast_search.space import DENSE, Candidate, LayerSpec

SCHEMA_VERSION = 1
WORDS = {dict: "an object", str: "text"}
ANEW = "Take the original, or search again."
Choices = Mapping[str, Candidate]


@dataclass(frozen=True)
class LayerPlan:
    """What one layer becomes.  num_blocks and rank are 0 for "dense"."""

    kind: str
    num_blocks: int
    rank: int
    in_features: int
    out_features: int

    @property
    def candidate(self) -> Candidate:
        return DENSE if self.kind == "dense" else Candidate(self.num_blocks, self.rank)

    @classmethod
    def of(cls, layer: LayerSpec, candidate: Candidate) -> LayerPlan:
        kind = "dense" if candidate.is_dense else "blast"
        m, n = layer.shape
        return cls(kind, candidate.num_blocks, candidate.rank, n, m)


@dataclass(frozen=True)
class Plan:
    """A plan and its evidence; what was predicted and what was measured are kept apart.

    The nested mappings are JSON values as described in docs/plan.md.
    `measured` is empty until a built model has been timed.
    """

    model: dict[str, Any]
    layers: dict[str, LayerPlan]
    task: str = ""
    workload: Any = None
    environment: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    weights_sha256: str = ""  # of model.safetensors beside it, in a saved model folder

    @property
    def choices(self) -> dict[str, Candidate]:
        return {name: layer.candidate for name, layer in self.layers.items()}

    def to_json(self) -> dict[str, Any]:
        value = {"schema_version": SCHEMA_VERSION} | asdict(self)
        return value | {"sha256": sha256_json(value)}

    def save(self, path: str | Path) -> None:
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            IncompatibleInputError: not JSON, truncated, edited (digest), of a newer schema, or
                with fields that are missing, unknown or impossible.
        """
        path = Path(path)
        path = path / "plan.json" if path.is_dir() else path
        return cls.from_json(read_json(path), str(path))

    @classmethod
    def from_json(cls, value: Any, origin: str = "plan") -> Plan:
        if not isinstance(value, dict) or "schema_version" not in value:
            raise IncompatibleInputError(
                f"{origin} is not a plan: it has no schema_version. Expected a plan.json, or one "
                "of a run's plans/, as blast-search writes them. Check the path."
            )
        version = value["schema_version"]
        if version != SCHEMA_VERSION:
            raise IncompatibleInputError(
                f"{origin} has schema_version {version!r}, this version reads {SCHEMA_VERSION}. "
                "Update blast-search, or search again."
            )
        value = dict(value)
        digest = value.pop("sha256", None)
        if digest != sha256_json(value):
            raise IncompatibleInputError(
                f"{origin}: the sha256 does not match its content, so the plan was edited or "
                "damaged. Take the original, or make a new plan with `blast-search pareto`."
            )
        del value["schema_version"]
        names = {f.name for f in fields(cls)}
        if set(value) != names:
            odd = sorted(set(value) ^ names)
            raise IncompatibleInputError(
                f"{origin}: missing or unknown fields {odd}, expected those of schema_version "
                f"{SCHEMA_VERSION}. {ANEW}"
            )
        for name, hint in get_type_hints(cls).items():
            kind = get_origin(hint) or hint
            if kind is not Any and not isinstance(value[name], kind):
                raise IncompatibleInputError(
                    f"{origin}: {name} is {value[name]!r}, expected {WORDS[kind]}. {ANEW}"
                )
        layers = {name: _layer(name, item, origin) for name, item in value["layers"].items()}
        return cls(**(value | {"layers": layers}))


def _layer(name: str, item: Any, origin: str) -> LayerPlan:
    counts = ("num_blocks", "rank", "in_features", "out_features")
    if not isinstance(item, dict) or set(item) != {"kind", *counts}:
        raise IncompatibleInputError(
            f"{origin}: layer {name} is {item}, expected exactly kind, {', '.join(counts)}. {ANEW}"
        )
    layer = LayerPlan(**item)
    b, r, n, m = (item[key] for key in counts)
    whole = all(type(item[key]) is int for key in counts)
    if layer.kind == "dense" and whole and b == r == 0 and n > 0 < m:
        return layer
    if layer.kind == "blast" and whole and b > 0 < r and n > 0 < m and not (m % b or n % b):
        return layer
    raise IncompatibleInputError(
        f'{origin}: layer {name} is {item}, expected kind "dense" with num_blocks = rank = 0, or '
        f'"blast" with num_blocks dividing both sides and rank >= 1. {ANEW}'
    )


CHOSEN = "chosen"  # the front's name of a run's plan where that is not the "searched" one


@dataclass(frozen=True)
class FrontPoint:
    """One whole plan on (or off) the front.

    `loss` is the true loss of the built model on calibration data; `latency_ratio` is predicted
    by the corrected table unless `latency_measured`.
    """

    name: str
    latency_ratio: float
    latency_measured: bool
    predicted_loss: float
    loss: float
    choices: Choices
    macs_ratio: float | None = None
    params_ratio: float | None = None

    FIELDS = (
        "name", "predicted_layer_latency_ratio", "measured_layer_latency_ratio",
        "predicted_loss_increase", "measured_loss", "on_front",
    )  # fmt: skip
    SIZES = ("macs_ratio", "params_ratio")  # after them; older files have none


def pareto(points: list[FrontPoint]) -> list[FrontPoint]:
    """The evaluated points that no other beats in both latency and true loss, fastest first."""
    front: list[FrontPoint] = []
    for point in sorted(points, key=lambda p: (p.latency_ratio, p.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front
