"""Moves of single layers that keep the predicted budget: one layer up, another one down.

Factors on types and depths (study.py) cannot say that one layer in particular was misjudged; a
move can.  Which of the many moves to try: the score table's own change, with every score taken to
be off by a third in the move's favour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blast_search.hull import Group
from blast_search.plan import Choices
from blast_search.space import Candidate

DOUBT = 1 / 3  # how far a score may be off
LONGEST = 3  # steps among a layer's undominated options
WIDTH = 200  # changes up, and changes down, that are paired with each other


@dataclass(frozen=True)
class _Change:
    """Another option of one group: its extra cost and extra (weighted) loss."""

    group: int
    option: int
    cost: float
    loss: float


def moves(
    groups: Sequence[Group], choices: Choices, budget_us: float
) -> Iterator[dict[str, Candidate]]:
    """Plans within the budget that differ by one change up and one down, best bet first.

    No group takes part in two of them: what is left of one idea after its failure is little.
    """
    picks = [
        g.candidates.index(choices[g.names[0]]) if choices[g.names[0]] in g.candidates else None
        for g in groups
    ]
    used = sum(float(g.usage[0][k]) for g, k in zip(groups, picks, strict=True) if k is not None)
    left = budget_us - used
    up, down = _changes(groups, picks)
    if not up or not down:
        return
    cost = _column(up, "cost")[:, None] + _column(down, "cost")[None, :]
    gain, harm = _column(up, "loss")[:, None], _column(down, "loss")[None, :]
    bet = gain + harm - DOUBT * (np.abs(gain) + np.abs(harm))
    same = _column(up, "group")[:, None] == _column(down, "group")[None, :]
    bet[(cost > left) | same] = np.inf
    taken: set[int] = set()
    for index in np.argsort(bet, axis=None, kind="stable"):
        row, column = divmod(int(index), len(down))
        pair = {up[row].group, down[column].group}
        if not np.isfinite(bet[row, column]):
            return
        if pair & taken:
            continue
        taken |= pair
        changed = dict(choices)
        for change in (up[row], down[column]):
            group = groups[change.group]
            changed |= dict.fromkeys(group.names, group.candidates[change.option])
        yield changed


def _column(changes: Sequence[_Change], name: str) -> NDArray[np.float64]:
    return np.array([getattr(change, name) for change in changes], np.float64)


def _changes(
    groups: Sequence[Group], picks: Sequence[int | None]
) -> tuple[list[_Change], list[_Change]]:
    """Changes to dearer options, most gain per cost first; to cheaper ones, least harm first."""
    up: list[_Change] = []
    down: list[_Change] = []
    for index, (group, pick) in enumerate(zip(groups, picks, strict=True)):
        if pick is None:  # a weighted solution of other ties: its option is dominated here
            continue
        for option in range(max(0, pick - LONGEST), min(len(group.loss), pick + LONGEST + 1)):
            cost = float(group.usage[0][option] - group.usage[0][pick])
            change = _Change(index, option, cost, float(group.loss[option] - group.loss[pick]))
            if option != pick:
                (up if cost > 0 else down).append(change)
    up.sort(key=lambda c: c.loss / c.cost)
    down.sort(key=lambda c: c.loss / -c.cost)
    return up[:WIDTH], down[:WIDTH]
