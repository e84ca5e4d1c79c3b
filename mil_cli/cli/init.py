"""``mil init``: writes a commented recipe, ``model.py`` and ``data.py`` for a model of one's own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mil_cli.errors import OutputError

TEMPLATE = "own_model"
FILES = ("recipe.yaml", "model.py", "data.py")


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; made if it is missing.")],
) -> None:
    """Write a commented recipe, model.py and data.py to start from with your own model."""
    from mil_cli.files import output_error, write_text
    from mil_cli.recipe.locations import recipes_folder

    taken = [name for name in FILES if (directory / name).exists()]
    if taken:
        hint = "choose another folder: what is there is not written over"
        raise OutputError(f"the folder already has {', '.join(taken)}", where=str(directory), hint=hint)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, directory) from None
    for name in FILES:
        write_text(directory / name, (recipes_folder() / TEMPLATE / name).read_text(encoding="utf-8"))
    recipe = shlex.quote(str(directory / "recipe.yaml"))
    typer.echo(f"wrote {', '.join(FILES)} in {directory}; now run: mil compress {recipe} --plan")
