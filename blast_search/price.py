"""What latency costs at a plan, and which layers would change first if the budget moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blast_search.engine import Contender, Engine
from blast_search.hull import Group, grouped
from blast_search.space import ties_of

MOVE = 0.01  # of the dense cost of the searched layers
MOST = 8  # layers named each way


def price(engine: Engine, contender: Contender, weights: Mapping[str, float]) -> dict[str, Any]:
    """plan.json, "search.price"; everything in it is predicted.

    Returns:
        loss_per_percent: added loss per percent of the layers' dense cost that is saved;
        layers: the changes that would save 1 % at least harm; looser: those that 1 % more would
        buy.  Costs are in percent of the layers' dense cost.
    """
    if engine.space.uniform:
        return {}
    groups = grouped(engine.options(), weights, ties_of(engine.layers))
    dense = engine.dense_cost
    down: list[tuple[float, dict[str, Any]]] = []
    up: list[tuple[float, dict[str, Any]]] = []
    for group in groups:
        choice = contender.choices[group.names[0]]
        if choice not in group.candidates:  # a uniform plan's rank between the space's
            continue
        pick = group.candidates.index(choice)
        cost, loss = group.usage[0] - group.usage[0][pick], group.loss - group.loss[pick]
        for k in range(len(loss)):
            if k != pick:
                item = _item(group, pick, k, float(cost[k]) / dense)
                (down if cost[k] < 0 else up).append((float(loss[k] / cost[k]), item))
    down.sort(key=lambda pair: -pair[0])  # loss per cost is negative: least harm per saving first
    up.sort(key=lambda pair: pair[0])  # most gain per cost first
    return {
        "loss_per_percent": _per_percent(down[0][1]) if down else None,
        "layers": _first(down, MOVE),
        "looser": _first(up, MOVE),
    }


def _per_percent(change: Mapping[str, Any]) -> float:
    """Without the weights that ordered the changes: they are relative, no unit of loss."""
    return float(change["loss"] / -change["cost_percent"])


def _item(group: Group, pick: int, k: int, cost: float) -> dict[str, Any]:
    return {
        "name": group.names[0], "tied": len(group.names) - 1,
        "from": group.candidates[pick].key, "to": group.candidates[k].key,
        "cost_percent": 100 * cost, "loss": float(group.plain[k] - group.plain[pick]),
    }  # fmt: skip


def _first(changes: Sequence[tuple[float, dict[str, Any]]], share: float) -> list[dict[str, Any]]:
    """The first changes, one per layer, until they make up the share."""
    found: dict[str, dict[str, Any]] = {}
    total = 0.0
    for _, item in changes:
        if item["name"] in found:
            continue
        if total >= 100 * share or len(found) == MOST:
            break
        found[item["name"]] = item
        total += abs(item["cost_percent"])
    return list(found.values())
