"""A ranking of architectures as tables on a terminal, or as plain text in a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mil_cli.assess.costs import CLOCKS, Spending
from mil_cli.assess.ranking import Interval
from mil_cli.assess.selection import VERSION, Entry, Ranking, from_json
from mil_cli.errors import OutputError
from mil_cli.report import text
from mil_cli.report.load import AGAIN, check_version, read
from mil_cli.report.terminal import line, list_files, new_table, show

_PARTS = {
    "scores": "scores",
    "partial": "partial trainings",
    "training": "whole trainings",
    "fit": "predictors",
}

Choices = Mapping[str, Mapping[str, str | int]]
"""What was chosen in each architecture, by its name."""

FILES = {
    "ranking.json": "this ranking for programs",
    "architectures.csv": "all that is known of each architecture; columns.json says what its columns are",
}
"""What the folder of a ranking holds for its user."""


def load_ranked(file: Path) -> tuple[Ranking, Choices]:
    """Return the ranking of a `ranking.json`, and what was chosen in its architectures.

    Raises:
        OutputError: It is damaged, or has another version.
    """
    content = check_version(read(file), VERSION, what="the ranking", where=str(file))
    try:
        return from_json(content), TypeAdapter(Choices).validate_python(content["choices"])
    except ValidationError as problem:
        first = problem.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except KeyError as problem:
        wrong = f"it has no {problem}"
    except (TypeError, AttributeError) as problem:
        wrong = str(problem)
    raise OutputError(f"the ranking is damaged: {wrong}", where=str(file), hint=AGAIN)


def render_ranking(
    ranking: Ranking,
    console: Console,
    *,
    shown: int = 20,
    choices: Choices | None = None,
    directory: Path | None = None,
) -> None:
    """Print a ranking.

    Args:
        ranking: What is printed.
        console: Where it is printed.
        shown: How many architectures, the best first.
        choices: What was chosen in each, by its name; that of the first is printed.
        directory: The run's folder; its files are listed if it is given.
    """
    show(console, _architectures(ranking, shown))
    hidden = len(ranking.entries) - shown
    if hidden > 0:
        line(console, f"[dim]and {hidden} more[/dim]")
    first = ranking.entries[0].id
    if choices is not None and first in choices:
        chosen = " ".join(f"{name}={choice}" for name, choice in choices[first].items())
        line(console, f"{escape(first)} is {escape(chosen)}")
    name = ranking.settings.predictor.method
    line(console, f"{name}: tau {_interval(ranking.tau)} on trained architectures that it had not seen")
    for column, tau in ranking.single.items():
        line(console, f"{escape(column)} alone: tau {_interval(tau)}")
    for point in ranking.curve:
        line(console, f"after {point.trained} trainings: tau {_interval(point.tau)}")
    if ranking.recommended:
        line(console, f"train next: {escape(', '.join(entry.id for entry in ranking.recommended))}")
    show(console, _costs(ranking))
    if ranking.costs.cpu_of_training_all is not None:
        line(console, f"training all would take about {text.duration(ranking.costs.cpu_of_training_all)} of processors")
    for notice in ranking.notices:
        line(console, f"[yellow]note:[/yellow] {escape(notice)}")
    if directory is not None:
        list_files(console, directory, FILES)


def _architectures(ranking: Ranking, shown: int) -> Table:
    level = text.percent(ranking.settings.level, 0)
    table = new_table("Architectures", "architecture", "rank", f"rank, {level}", "quality", f"quality, {level}", "from")
    for entry in ranking.entries[:shown]:
        table.add_row(
            escape(entry.id),
            str(entry.rank),
            f"{entry.rank_low} to {entry.rank_high}",
            text.quality(entry.quality),
            _range(entry),
            entry.source,
        )
    return table


def _range(entry: Entry) -> str:
    if entry.low is None or entry.low == entry.high:
        return text.NOT_MEASURED
    return f"{text.quality(entry.low)} to {text.quality(entry.high)}"


def _interval(tau: Interval) -> str:
    return f"{tau.value:.2f} ({tau.low:.2f} to {tau.high:.2f})"


def _costs(ranking: Ranking) -> Table:
    table = new_table("What it cost", "part", "architectures", "processors", "passed", "not known of")
    for name, spending in ranking.costs.parts.items():
        if spending.architectures:
            table.add_row(
                _PARTS[name],
                str(spending.architectures),
                _seconds(spending.cpu),
                _seconds(spending.wall),
                _unknown(spending),
            )
    total = [text.duration(ranking.costs.total(clock)) for clock in CLOCKS]
    table.add_row("in all", "", *total, "")
    return table


def _seconds(seconds: float | None) -> str:
    return text.NOT_MEASURED if seconds is None else text.duration(seconds)


def _unknown(spending: Spending) -> str:
    return str(spending.cpu_unknown) if spending.cpu_unknown else ""
