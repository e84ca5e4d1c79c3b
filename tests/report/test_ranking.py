"""A ranking on a terminal, and as it is read from what a run left."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mil_cli.assess.active import Acquisition
from mil_cli.assess.columns import Columns, Seconds
from mil_cli.assess.predictors.ridge import Ridge
from mil_cli.assess.rank_table import rank_table
from mil_cli.assess.ranking import Interval
from mil_cli.assess.selection import RankConfig, Ranking, as_json
from mil_cli.assess.table import table_of
from mil_cli.errors import OutputError
from mil_cli.report.ranking import load_ranked, render_ranking


def ranking(**settings: Any) -> Ranking:
    columns = Columns(features=("depth",), scores=("score",), cpu_seconds=Seconds(training=("seconds",)))
    records = [
        {
            "id": f"net[{row}]",
            "depth": row,
            "score": row % 5,
            "quality": row / 100 if row % 2 else None,
            "seconds": 60.0,
        }
        for row in range(30)
    ]
    table = table_of([(str(record["id"]), record) for record in records], columns)
    config = RankConfig(
        predictor=Ridge(target="value"),
        refits=2,
        repeats=1,
        draws=100,
        next=Acquisition(batch=2),
        curve=(5,),
        curve_repeats=2,
        **settings,
    )
    return rank_table(table, config)


def printed(found: Ranking, **options: Any) -> str:
    stream = io.StringIO()
    render_ranking(found, Console(file=stream, width=80), **options)
    return stream.getvalue()


def test_order_trust_and_costs_are_printed() -> None:
    output = printed(ranking(), shown=4)
    for words in (
        "net[29]",
        "predicted",
        "0.2900",
        "and 26 more",
        "ridge: tau 1.00 (1.00 to 1.00)",
        "score alone: tau",
        "after 5 trainings: tau",
        "train next: net[28]",
        "whole trainings",
        "15 min 0 s",
        "training all would take about 30 min 0 s",
    ):
        assert words in output
    assert "net[2]" not in output.split("and 26 more")[0]


def test_what_a_run_left_is_printed_alike(tmp_path: Path) -> None:
    found = replace(ranking(level=0.8), tau=Interval(0.5, math.nan, math.nan), coverage=math.nan)
    choices = {found.entries[0].id: {"width": 8, "block": "conv"}}
    file = tmp_path / "ranking.json"
    file.write_text(json.dumps({**as_json(found), "choices": choices}), encoding="utf-8")
    again, chosen = load_ranked(file)
    assert chosen == choices
    assert printed(again, choices=chosen) == printed(found, choices=choices)
    assert repr(again) == repr(found)  # as equality does not hold for NaN


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda content: {**content, "version": 2}, "another version"),
    "list": (lambda content: [content], "not a mapping"),
    "part": (lambda content: {name: content[name] for name in content if name != "costs"}, "no 'costs'"),
    "kind": (lambda content: {**content, "costs": 3}, "damaged"),
    "value": (lambda content: {**content, "higher_is_better": "often"}, "higher_is_better: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_shown_is_explained(tmp_path: Path, damage: str) -> None:
    change, words = DAMAGES[damage]
    file = tmp_path / "ranking.json"
    file.write_text(json.dumps(change({**as_json(ranking()), "choices": {}})), encoding="utf-8")
    with pytest.raises(OutputError, match=words):
        load_ranked(file)
