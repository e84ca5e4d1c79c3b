"""``mil report``: shows a run again, or joins the points of a sweep into one table and page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mil_cli.errors import OutputError


def report(
    directory: Annotated[Path, typer.Argument(metavar="RUN_OR_SWEEP_DIR", help="A run's folder, or a sweep's.")],
) -> None:
    """Show the report of a run again, or the table and Pareto front of a sweep."""
    from mil_cli.cli import console
    from mil_cli.report.load import FILE, load_report
    from mil_cli.report.terminal import render

    stdout = console.results()
    if (directory / FILE).is_file() or directory.is_file():
        render(load_report(directory), stdout, directory=directory if directory.is_dir() else directory.parent)
        return
    if not directory.is_dir():
        hint = "name a folder below runs/, such as runs/RECIPE/latest"
        raise OutputError("there is no such folder", where=str(directory), hint=hint)

    from mil_cli.report.sweep import render_sweep

    render_sweep(directory, stdout)
