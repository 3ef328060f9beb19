"""The parts of the report that say what was chosen, why, and how far it can be trusted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from blast_search.plan_check import CHECKED, check_text
from blast_search.space import DENSE, Call, LayerSpec
from blast_search.tables import FIELDS, LatencyTable


def sections(run: Path, plan: Plan, front: Sequence[FrontRow]) -> list[Section]:
    inventory = _inventory(run / "layers.json")
    return [
        Section("The plan, layer by layer", _layers(plan)),
        Section("Layers that stayed dense", _dense_layers(run, plan, inventory)),
        Section("If the budget moved (predicted)", _price(plan)),
        Section("Prediction against measurement", _accuracy(plan, front)),
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
    return ".".join(part for part in name.split(".") if not part.isdecimal())


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
    items = pick(plan.search, "price", "layers")
    rows = [
        [Code(clean(pick(item, "name") or "-")), Code(clean(pick(item, "from") or "-")),
         Code(clean(pick(item, "to") or "-")), show(pick(item, "saves_us"), ".1f"),
         show(pick(item, "loss"), ".3g")]
        for item in (items if isinstance(items, list) else [])
    ]  # fmt: skip
    if not rows:
        return [Paragraph("Not recorded for this run.")]
    head = ["layer", "from", "to", "predicted saving, us", "predicted added loss"]
    text = "With a slightly smaller budget, these layers would change first; all values predicted."
    return [Paragraph(text), Table(head, rows, 3, stacked=True)]


def _accuracy(plan: Plan, front: Sequence[FrontRow]) -> list[Block]:
    chosen = next((row for row in front if row.name == "searched"), None)
    pairs = [
        ("layer latency ratio", pick(plan.predicted, "latency_ratio_layers"),
         pick(plan.measured, "latency_ratio_layers")),
        ("latency of a call, ms", pick(plan.predicted, "latency_ms"),
         pick(plan.measured, "latency_ms", "median")),
        ("added loss before retraining", pick(plan.predicted, "score_increase"),
         chosen.loss if chosen else None),
    ]  # fmt: skip
    rows = []
    for name, predicted, measured in pairs:
        a, b = number(predicted), number(measured)
        off = "-" if a is None or not b else f"{(a / b - 1) * 100:+.1f}%"
        rows.append([name, show(a, ".4g"), show(b, ".4g"), off])
    blocks: list[Block] = [
        Table(["this plan", "predicted", "measured", "prediction off by"], rows)
    ]
    texts = (_latency_check(plan), _latency_error(plan), _noise(plan), _additivity(plan))
    blocks += [Paragraph(text) for text in texts if text]
    rounds = pick(plan.search, "rounds")
    steps = [
        [str(n), show(pick(r, "predicted_ratio")), show(pick(r, "measured_ratio"))]
        for n, r in enumerate(rounds if isinstance(rounds, list) else [], start=1)
    ]
    if steps:
        text = "The plan was built, timed and chosen anew until its measured latency fitted:"
        head = ["round", "predicted layer ratio", "measured layer ratio"]
        blocks += [Paragraph(text), Table(head, steps)]
    gap = number(pick(plan.search, "optimality_gap"))
    if gap is not None:
        text = f"Within the table the exact plan is at most {gap * 100:.2g}% from the optimum"
        solver = clean(pick(plan.search, "solver") or "")
        blocks.append(Paragraph(text + (f" (solver: {solver})." if solver else ".")))
    return blocks


def _latency_check(plan: Plan) -> str:
    found = plan.search.get("latency_check")
    if isinstance(found, dict) and all(number(pick(found, key)) is not None for key in CHECKED):
        return check_text(found)
    return "No random plans were timed, so the error of predicted latency is not known."


def _latency_error(plan: Plan) -> str:
    found = pick(plan.search, "latency_error")
    median, worst = number(pick(found, "median")), number(pick(found, "worst"))
    if median is None or worst is None:
        return ""
    return (
        f"In the {show(pick(found, 'plans'), '.0f')} rounds of the closed loop, predicted layer "
        f"latency differed from measured by {median * 100:.1f}% (median), {worst * 100:.1f}% "
        "(worst)."
    )


def _noise(plan: Plan) -> str:
    return clean(pick(plan.search, "timing_noise", "text") or "")


def _additivity(plan: Plan) -> str:
    found = pick(plan.search, "additivity")
    rank = number(pick(found, "rank_correlation"))
    if rank is None:
        return "Additivity was not checked: whether layer scores add up to the loss is not known."
    return (
        f"Additivity: on {show(pick(found, 'plans'), '.0f')} plans, the sum of predicted layer "
        f"scores ranks the measured loss with a rank correlation of {rank:.2f} (1 is perfect) and "
        f"a slope of {show(pick(found, 'slope'), '.2f')} (1 means that scores simply add up)."
    )


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
