"""``mil rank``: many architectures in order, after few trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def rank(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe with a section rank.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as rank.train=20"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run's folder; runs/RECIPE/TIME by default.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Assess and train anew what is known already.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the ranking as JSON.")
    ] = None,
) -> int:
    """Rank the architectures of a space, or of a table, after training a few of them."""
    from mil_cli.cli import console
    from mil_cli.cli.progress import progress_on
    from mil_cli.cli.subjects import check_writable

    if json_file is not None:
        check_writable(json_file, option="--json")
    from mil_cli.recipe.rank import load_ranking

    loaded = load_ranking(recipe, overrides or [])

    from mil_cli.files import write_json
    from mil_cli.report.ranking import render_ranking
    from mil_cli.run.rank import rank_recipe

    result = rank_recipe(loaded, out=out, fresh=fresh, progress=progress_on(console.messages()))
    if json_file is not None:
        write_json(json_file, result.report)
    directory = console.from_here(result.directory)
    render_ranking(result.ranking, console.results(), choices=result.choices, directory=directory)
    return 0
