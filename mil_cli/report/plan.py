"""What a run would do and how long it would take, on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from mil_cli.report import text, view
from mil_cli.report.terminal import line, new_table, show
from mil_cli.run.plan import Plan


def render_plan(plan: Plan, console: Console) -> None:
    """Print a plan.

    Args:
        plan: What the dry run found.
        console: Where it is printed.
    """
    line(console, f"[bold]{escape(plan.name)}[/bold]: the dry run of the whole chain and the export went through")
    samples = ", ".join(f"{count:,} {name}" for name, count in plan.samples.items())
    line(console, f"model: {text.count(plan.macs)} macs, {text.count(plan.params)} parameters; samples: {samples}")
    for name, axes in plan.dynamic.items():
        free = ", ".join(f"{axis} ({symbol})" for axis, symbol in axes.items()) or "none"
        line(console, f"input {escape(name)}: free axes {escape(free)}")
    table = new_table("Stages", "stage", "method", "macs", "kept", "params", "time, estimated", numbers_from=2)
    for stage in plan.stages:
        kept = text.percent(stage.macs / plan.macs, 1) if plan.macs else text.NOT_MEASURED
        table.add_row(
            escape(stage.name),
            escape(f"{stage.family}/{stage.method}"),
            text.count(stage.macs),
            kept,
            text.count(stage.params),
            text.duration(stage.seconds),
        )
    show(console, table)
    line(console, f"estimated time of the stages, nothing cached: {text.duration(plan.seconds)}")
    if plan.goals:
        goals = new_table("Goals", "goal", "bound", "in the dry run", numbers_from=1)
        for name, bounds in plan.goals.items():
            for kind, bound in bounds.items():
                value = _reached(plan, name, kind)
                goal = view.goal_line({"name": name, "kind": kind, "bound": bound, "value": value or 0.0, "met": True})
                beyond = "" if value is None or value <= bound else ", above it"
                goals.add_row(escape(goal.name), goal.bound, "" if value is None else f"{goal.value}{beyond}")
        show(console, goals)
    else:
        line(console, "the recipe sets no goals")
    for notice in plan.notices:
        line(console, f"[yellow]note:[/yellow] {escape(notice)}")


def _reached(plan: Plan, name: str, kind: str) -> float | None:
    """Return what a goal's figure was in the dry run; None if only the real run can tell.

    Targets decide over operations and parameters, whatever the samples; quality and times follow from training and
    measuring, and nothing is trained or measured in a dry run.
    """
    if name not in ("macs", "params") or not plan.stages:
        return None
    original, last = getattr(plan, name), getattr(plan.stages[-1], name)
    if kind == "max_ratio":
        return last / original if original else None
    return float(last)
