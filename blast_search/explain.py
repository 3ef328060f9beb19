"""The parts of the report that say what was chosen, why, and how far it can be trusted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blast_search import accuracy
from blast_search.document import (
    Block,
    Code,
    Details,
    Paragraph,
    Section,
    Table,
    clean,
    number,
    pick,
    show,
)
from blast_search.errors import IncompatibleInputError
from blast_search.figures import FrontRow
from blast_search.files import read_json, read_rows
from blast_search.plan import LayerPlan, Plan
from blast_search.space import DENSE, Call, LayerSpec
from blast_search.tables import FIELDS, LatencyTable


def sections(run: Path, plan: Plan, front: Sequence[FrontRow]) -> list[Section]:
    inventory = _inventory(run / "layers.json")
    return [
        Section("The plan, layer by layer", _layers(plan)),
        Section("Layers that stayed dense", _dense_layers(run, plan, inventory)),
        Section("If the budget moved (predicted)", _price(plan)),
        Section("Prediction against measurement", accuracy.blocks(plan, front)),
        Section("Environment", _environment(run, plan)),
    ]


def _inventory(path: Path) -> Mapping[str, Any]:
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise IncompatibleInputError(
            f"{path} holds {type(value).__name__}, expected an object. Restore the file."
        )
    return value


def _type_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdecimal()) or name


def _label(layer: LayerPlan) -> str:
    if layer.kind == "dense":
        return "dense"
    return f"b = {layer.num_blocks}, r = {layer.rank}"


def _kept(layer: LayerPlan) -> float:
    """Fraction of the dense weight's parameters."""
    m, n = layer.out_features, layer.in_features
    return 1.0 if layer.kind == "dense" else layer.rank * (m + n + layer.num_blocks**2) / (m * n)


def _summary(layers: Sequence[LayerPlan]) -> str:
    """How many layers take which b and which range of ranks, dense ones last."""
    ranks: dict[int, list[int]] = defaultdict(list)
    for layer in layers:
        ranks[layer.num_blocks].append(layer.rank)
    parts = []
    for b, found in sorted(ranks.items(), key=lambda item: (item[0] == 0, item[0])):
        low, high = min(found), max(found)
        span = f"{low}" if low == high else f"{low} to {high}"
        parts.append(f"{len(found)} of b = {b}, r = {span}" if b else f"{len(found)} dense")
    return "; ".join(parts)


def _layers(plan: Plan) -> list[Block]:
    if not plan.layers:
        return [Paragraph("The plan names no layers.")]
    groups: dict[tuple[str, int, int], list[LayerPlan]] = defaultdict(list)
    for name, layer in plan.layers.items():
        groups[_type_name(name), layer.out_features, layer.in_features].append(layer)
    rows = []
    for (kind, m, n), layers in groups.items():
        kept = sum(map(_kept, layers)) / len(layers)
        choices = _summary(layers)
        rows.append([Code(kind), choices, f"{m} x {n}", str(len(layers)), f"{kept:.2f}"])
    full = [
        [Code(name), _label(layer), f"{layer.out_features} x {layer.in_features}",
         f"{_kept(layer):.3f}"]
        for name, layer in plan.layers.items()
    ]  # fmt: skip
    changed = sum(layer.kind != "dense" for layer in plan.layers.values())
    text = (
        f"{changed} of {len(plan.layers)} searched layers become BLAST matrices of b x b blocks "
        "and rank r (b = 1 is plain low rank). Shapes are outputs x inputs; 'kept' is the "
        "fraction of the weight's parameters."
    )
    types = Table(
        ["layer type", "choices", "shape", "layers", "kept (mean)"], rows, 2, stacked=True
    )
    every = Table(["layer", "choice", "shape", "kept"], full, 2)
    return [Paragraph(text), types, Details(f"All {len(full)} layers", every)]


def _dense_layers(run: Path, plan: Plan, inventory: Mapping[str, Any]) -> list[Block]:
    """Searched layers that stay dense with the reason the table gives, and unsearched ones."""
    table = _latency_table(run / "latency.csv")
    specs = {spec.name: spec for spec in _specs(inventory)}
    reasons = Counter(
        (_type_name(name), _reason(specs.get(name), table))
        for name, layer in plan.layers.items()
        if layer.kind == "dense"
    )
    skipped = inventory.get("skipped")
    passed = Counter(
        (_type_name(str(name)), f"not searched: {clean(reason)}")
        for name, reason in (skipped.items() if isinstance(skipped, dict) else ())
    )
    rows = [[Code(kind), why, str(n)] for (kind, why), n in [*reasons.items(), *passed.items()]]
    if not rows:
        unknown = "" if inventory else " There is no layers.json, so skipped layers are not known."
        return [Paragraph(f"No searched layer stayed dense.{unknown}")]
    return [Table(["layer type", "reason", "layers"], rows, 2, stacked=True)]


def _latency_table(path: Path) -> LatencyTable | None:
    rows = read_rows(path, FIELDS)
    return LatencyTable.open(path, rows[0]["device"]) if rows else None


def _specs(inventory: Mapping[str, Any]) -> list[LayerSpec]:
    try:
        return [
            LayerSpec(
                str(item["name"]), int(item["in_features"]), int(item["out_features"]),
                bool(item["bias"]), tuple(Call(**call) for call in item["calls"]),
            )
            for item in inventory.get("layers", [])
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise IncompatibleInputError(
            f"layers.json: a layer is not as written by blast-search ({error!r}). "
            "Restore the file."
        ) from error


def _reason(spec: LayerSpec | None, table: LatencyTable | None) -> str:
    costs = table.costs(spec) if spec and table else {}
    dense = costs.pop(DENSE, 0.0)
    if not costs or not dense:
        return "no measurement of its candidates in latency.csv"
    best = min(costs, key=lambda candidate: costs[candidate])
    ratio = costs[best] / dense
    name = f"b = {best.num_blocks}, r = {best.rank}"
    if ratio >= 1:
        return f"no candidate is faster: the best, {name}, takes {ratio:.2f} of dense (measured)"
    return (
        f"faster candidates exist (down to {ratio:.2f} of dense, measured), but the solver "
        "judged their predicted harm to quality not worth the time saved"
    )


def _price(plan: Plan) -> list[Block]:
    price = number(pick(plan.search, "price", "loss_per_percent"))
    tighter, looser = (_changes(pick(plan.search, "price", key)) for key in ("layers", "looser"))
    if not tighter and not looser:
        return [Paragraph("Not recorded for this run.")]
    units = {"macs": "multiply-adds", "params": "parameters"}
    unit = units.get(str(pick(plan.budget, "scope")), "latency")
    head = ["layer", "from", "to", "cost, % of the searched layers' dense cost", "loss"]
    blocks: list[Block] = []
    if price is not None:
        blocks.append(
            Paragraph(
                f"The price of {unit} at this plan: {price:.3g} of added loss for each percent "
                "of the searched layers' dense cost that is saved."
            )
        )
    for changes, text in (
        (tighter, "A budget smaller by 1% would change these layers first:"),
        (looser, "A budget larger by 1% would be spent on these layers first:"),
    ):
        if changes:
            blocks += [Paragraph(text), Table(head, changes, 3, stacked=True)]
    return blocks


def _changes(items: Any) -> list[list[str]]:
    return [
        [Code(clean(pick(item, "name") or "-")), Code(clean(pick(item, "from") or "-")),
         Code(clean(pick(item, "to") or "-")), show(pick(item, "cost_percent"), "+.2f"),
         show(pick(item, "loss"), "+.3g")]
        for item in (items if isinstance(items, list) else [])
    ]  # fmt: skip


def _environment(run: Path, plan: Plan) -> list[Block]:
    values: Any = plan.environment
    if not values and (run / "environment.json").is_file():
        values = read_json(run / "environment.json")
    rows = [[str(key), _text(value)] for key, value in _items(values)]
    for item in plan.workload if isinstance(plan.workload, list) else []:
        name, weight = clean(pick(item, "name") or "-"), show(pick(item, "weight"), "g")
        rows.append(["workload", f"{name}: {_text(pick(item, 'shape'))}, weight {weight}"])
    rows += [
        ["parameters of the dense model", show(pick(plan.model, "params"), ",.0f")],
        ["multiply-adds of the dense model", show(pick(plan.model, "macs"), ",.0f")],
        ["trials", show(pick(plan.search, "trials"), ".0f")],
        ["seed", show(pick(plan.search, "seed"), ".0f")],
        ["peak memory, MB", show(pick(plan.search, "peak_memory_mb"), ",.0f")],
        ["timed runs of this plan", show(pick(plan.measured, "latency_ms", "runs"), ".0f")],
        ["plan created", clean(plan.created) or "-"],
    ]
    return [Table(["", "value"], rows, 2)]


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _text(value: Any) -> str:
    """A JSON value in plain words: no braces, no quotes."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list):
        whole = all(isinstance(item, int) for item in value)
        return (" x " if whole else ", ").join(map(_text, value)) or "-"
    return "-" if value is None else clean(value) or "-"
