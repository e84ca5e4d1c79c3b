"""``mil report``: shows a run or a ranking again, or joins the points of a sweep into one table and page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mil_cli.errors import OutputError


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="RUN_OR_SWEEP_DIR", help="The folder of a run, a ranking or a sweep.")
    ],
) -> None:
    """Show a run or a ranking again, or the table and Pareto front of a sweep."""
    from mil_cli.cli import console
    from mil_cli.report.load import FILE, load_report
    from mil_cli.report.terminal import render
    from mil_cli.run.directory import RANKING

    stdout = console.results()
    ranked = directory / RANKING if directory.is_dir() else directory
    if ranked.name == RANKING and ranked.is_file():
        from mil_cli.report.ranking import load_ranked, render_ranking

        ranking, choices = load_ranked(ranked)
        render_ranking(ranking, stdout, choices=choices, directory=ranked.parent)
        return
    if (directory / FILE).is_file() or directory.is_file():
        render(load_report(directory), stdout, directory=directory if directory.is_dir() else directory.parent)
        return
    if not directory.is_dir():
        hint = "name a folder below runs/, such as runs/RECIPE/latest"
        raise OutputError("there is no such folder", where=str(directory), hint=hint)

    from mil_cli.report.sweep import render_sweep

    render_sweep(directory, stdout)
