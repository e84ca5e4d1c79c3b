"""A run's report as tables on a terminal, or as plain text in a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from mil_cli.report import text, view
from mil_cli.report.load import Report

FILES = {
    "model.onnx": "the compressed model, in place of baseline.onnx",
    "baseline.onnx": "the uncompressed model",
    "model.pt2": "the compressed model as a graph, for torch",
    "report.html": "this report as a page",
    "report.json": "this report for programs",
}
"""What a run directory holds for its user."""


NARROW = 110
"""Columns below which a terminal gets shorter tables."""


def render(report: Report, console: Console, *, directory: Path | None = None) -> None:
    """Print a run's report.

    Args:
        report: The content of `report.json`.
        console: Where it is printed.
        directory: The run's folder; its files are listed if it is given.
    """
    line(console, f"[bold]{escape(view.title(report))}[/bold]: {_outcome(report)}")
    line(console, f"[dim]{escape(view.device_line(report))}[/dim]")
    if report["goals"]:
        show(console, _goals(report))
    show(console, _comparison(report))
    stages = view.stages_view(report)
    if stages.lines:
        show(console, _stages(stages, narrow=console.is_terminal and console.width < NARROW))
        line(
            console,
            f"[dim]change is against the stage before; stages took {stages.total} when they were computed[/dim]",
        )
    for stage in stages.lines:
        for sentence in view.convergence_lines(stage, metric=stages.metric):
            line(console, f"{escape(stage.name)}: {escape(sentence)}")
    line(console, f"proof: {escape(view.parity_line(report))}")
    if kernels := view.kernels_line(report):
        line(console, f"kernels: {escape(kernels)}")
    for notice in report.get("notices") or []:
        line(console, f"[yellow]note:[/yellow] {escape(str(notice))}")
    if directory is not None:
        list_files(console, directory, FILES)


def list_files(console: Console, directory: Path, files: Mapping[str, str]) -> None:
    """Print which of some files a folder holds, and what each is."""
    line(console, "")
    for name, what in files.items():
        if (directory / name).exists():
            line(console, f"{escape(str(directory / name))}  [dim]{what}[/dim]")


def line(console: Console, markup: str) -> None:
    """Print one line; off a terminal it is never broken."""
    console.print(markup, soft_wrap=not console.is_terminal, highlight=False)


def show(console: Console, table: Table) -> None:
    """Print a table; off a terminal it is as wide as it needs."""
    console.print()
    if console.is_terminal:
        console.print(table, highlight=False)
        return
    unbounded = console.options.update(max_width=100_000)
    width = console.width
    console.width = max(width, Measurement.get(console, unbounded, table).maximum)
    try:
        console.print(table, highlight=False)
    finally:
        console.width = width


def new_table(heading: str, *columns: str, numbers_from: int = 1) -> Table:
    """Return an empty table whose columns from `numbers_from` on are set to the right."""
    table = Table(title=heading, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position >= numbers_from else "left", overflow="fold")
    return table


def met_text(met: bool) -> str:
    """Return the verdict on a goal, coloured."""
    return "[green]met[/green]" if met else "[bold red]missed[/bold red]"


def _outcome(report: Report) -> str:
    style = "green" if report["goals_met"] and report["goals"] else "dim" if not report["goals"] else "bold red"
    return f"[{style}]{view.outcome(report)}[/{style}]"


def _goals(report: Report) -> Table:
    table = new_table("Goals", "goal", "bound", "reached", "margin", "verdict")
    for goal in view.goal_lines(report):
        table.add_row(escape(goal.name), goal.bound, goal.value, goal.margin, met_text(goal.met))
    return table


def _comparison(report: Report) -> Table:
    table = new_table("Uncompressed and final file", "figure", "uncompressed", "final", "change")
    for row in view.comparison_lines(report):
        style = "" if row.better is None else "green" if row.better else "yellow"
        change = f"[{style}]{escape(row.change)}[/{style}]" if style else escape(row.change)
        table.add_row(escape(row.name), row.baseline, row.final, change)
    return table


def _stages(stages: view.StagesView, *, narrow: bool) -> Table:
    columns = ["stage", "method", f"{stages.metric} ({stages.split})", "macs", "params"]
    if stages.measured:
        columns += ["file", "latency p50"]
    table = new_table("Stages: what each gained and cost", *map(escape, columns), "time", numbers_from=2)
    for stage in stages.lines:
        style = "dim" if stage.quality_change == "0" else "yellow" if stage.worse else "green"
        change = f" [{style}]({stage.quality_change})[/{style}]" if stage.quality_change else ""
        cells = [
            escape(stage.name),
            escape(stage.method.rpartition("/")[2] if narrow else stage.method),
            f"{stage.quality}{change}",
            f"{stage.macs}{_kept(stage.macs_kept)}",
            f"{stage.params}{_kept(stage.params_kept)}",
        ]
        if stages.measured:
            cells += [stage.size, stage.latency]
        table.add_row(*cells, f"{stage.seconds}{' [dim](cached)[/dim]' if stage.cached else ''}")
    return table


def _kept(share: float | None) -> str:
    return "" if share is None else f" ({text.percent(share, 0 if share > 0.9995 else 1)})"
