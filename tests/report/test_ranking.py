from __future__ import annotations

import io

from rich.console import Console

from mil_cli.assess.active import Acquisition
from mil_cli.assess.columns import Columns, Seconds
from mil_cli.assess.predictors.ridge import Ridge
from mil_cli.assess.rank_table import rank_table
from mil_cli.assess.selection import RankConfig
from mil_cli.assess.table import table_of
from mil_cli.report.ranking import render_ranking


def test_order_trust_and_costs_are_printed() -> None:
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
    )
    stream = io.StringIO()
    render_ranking(rank_table(table, config), Console(file=stream, width=80), shown=4)
    output = stream.getvalue()
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
