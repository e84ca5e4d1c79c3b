"""``mil compress``: run a recipe's chain, one sweep of it, or only plan it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compress(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe's .yaml file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as stages.prune.macs=0.2"),
    ] = None,
    multirun: Annotated[
        bool, typer.Option("-m", "--multirun", help="Sweep: run every combination of values such as key=1,2")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run's folder; runs/RECIPE/TIME by default.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute this run's stages anew.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Check all on a tiny batch, print the plan, stop.")] = False,
) -> int:
    """Compress the model of a recipe and prove the result on the exported ONNX file."""
    if multirun:
        from mil_cli.cli.sweep import run_sweep

        return run_sweep(recipe, overrides or [], out=out, fresh=fresh, plan=plan)
    from mil_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])

    from mil_cli.cli import console
    from mil_cli.cli.progress import progress_on

    progress = progress_on(console.messages())
    if plan:
        from mil_cli.report.plan import render_plan
        from mil_cli.run.plan import plan_recipe

        render_plan(plan_recipe(loaded, progress=progress), console.results())
        return 0

    from mil_cli.report.html import write_html
    from mil_cli.report.terminal import render
    from mil_cli.run.directory import PAGE
    from mil_cli.run.runner import run_recipe

    result = run_recipe(loaded, out=out, fresh=fresh, progress=progress)
    if not result.report:
        return 0  # a process of torchrun's that helped to train; the first one reports
    write_html(result.report, result.directory / PAGE)
    render(result.report, console.results(), directory=console.from_here(result.directory))
    return 0 if result.goals_met else 3
