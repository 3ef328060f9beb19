"""What latency costs at a plan: predicted, and in the unit of the loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from blast_search.price import price
from blast_search.space import DENSE, Candidate
from blast_search.tables import Option

SMALL = Candidate(1, 8)


def test_the_price_is_in_units_of_loss_whatever_weights_the_plan_was_solved_with():
    options = {
        "a": [Option(DENSE, 60.0, 0.0), Option(SMALL, 20.0, 0.4)],  # 40 % for 0.4
        "b": [Option(DENSE, 40.0, 0.0), Option(SMALL, 20.0, 0.1)],  # 20 % for 0.1
    }
    layers = [SimpleNamespace(name=name, tie="") for name in options]
    engine: Any = SimpleNamespace(
        space=SimpleNamespace(uniform=False), options=lambda: options, layers=layers,
        dense_cost=100.0,
    )  # fmt: skip
    plan: Any = SimpleNamespace(choices={"a": DENSE, "b": DENSE})
    plain = price(engine, plan, {})
    assert plain["layers"][0]["name"] == "b"
    assert plain["loss_per_percent"] == pytest.approx(0.1 / 20)
    weighted = price(engine, plan, {"b": 8.0})  # now a's change is thought the cheaper one
    assert weighted["layers"][0]["name"] == "a"
    assert weighted["loss_per_percent"] == pytest.approx(0.4 / 40)
