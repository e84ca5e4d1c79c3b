"""Costs: every second that was spent is counted, and what is not known is said."""

from __future__ import annotations

import pytest

from mil_cli.assess.columns import Columns, Seconds
from mil_cli.assess.costs import Spending, costs_of
from mil_cli.assess.table import Cell, table_of

COLUMNS = Columns(
    features=("depth",),
    scores=("synflow", "naswot"),
    partial=("early",),
    cpu_seconds=Seconds(scores=("s1", "s2"), partial=("p",), training=("t",)),
    wall_seconds=Seconds(training=("w",)),
)

KEYS = ("id", "depth", "synflow", "naswot", "early", "quality", "s1", "s2", "p", "t", "w")

ROWS: list[tuple[Cell, ...]] = [
    ("a", 1, 1.0, 2.0, 0.5, 0.9, 1, 2, 10, 100, 50),
    ("a", 1, 1.0, 2.0, 0.5, 0.8, 1, 2, 10, 140, 70),  # trained again
    ("b", 2, 1.0, None, None, "nan", 1, 2, None, 90, 45),  # collapsed
    ("b", 2, None, None, 0.3, None, None, None, None, None, None),  # not trained again
    ("c", 3, 1.0, 2.0, 0.4, None, 1, 2, None, None, None),  # does not say what its partial training took
    ("d", 4, None, None, None, None, None, None, None, None, None),
]


def test_all_is_counted() -> None:
    table = table_of([("row", dict(zip(KEYS, row, strict=True))) for row in ROWS], COLUMNS)
    costs = costs_of(table, fit_cpu=7.0, fit_wall=8.0)
    assert costs.scores == Spending(3, 12.0, None, wall_unknown=3)
    assert costs.partial == Spending(3, 20.0, None, cpu_unknown=2, wall_unknown=3)
    assert costs.training == Spending(2, 330.0, 165.0)
    assert costs.fit == Spending(1, 7.0, 8.0)
    assert costs.total("cpu") == 12 + 20 + 330 + 7
    assert costs.total("wall") == 165 + 8
    assert not costs.complete
    assert costs.cpu_of_training_all == pytest.approx(4 * (120 + 90) / 2)


def test_without_seconds_nothing_is_known_of_all() -> None:
    columns = Columns(features=("depth",))
    table = table_of([("row", {"id": "a", "depth": 1, "quality": 0.5})], columns)
    costs = costs_of(table, fit_cpu=1.0, fit_wall=1.0)
    assert costs.training == Spending(1, None, None, 1, 1)
    assert costs.scores == Spending(0, None, None)
    assert costs.cpu_of_training_all is None
