"""``mil list``: what there is, one line each, read from the first comment line of the shipped files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Kind(StrEnum):
    """What can be listed."""

    STAGES = "stages"
    RECIPES = "recipes"
    DEVICES = "devices"
    MODELS = "models"
    DATA = "data"
    TASKS = "tasks"


_GROUPS = {Kind.DEVICES: "device", Kind.MODELS: "model", Kind.DATA: "data", Kind.TASKS: "task"}


def list_(
    kind: Annotated[Kind | None, typer.Argument(metavar="[stages|recipes|devices|models|data|tasks]")] = None,
) -> None:
    """Show the stages, recipes, devices, models, data and tasks that there are."""
    for wanted in [kind] if kind is not None else list(Kind):
        lines = entries(wanted)
        if kind is None:
            typer.echo(f"{wanted.value}:")
        width = max((len(name) for name, _ in lines), default=0)
        for name, description in lines:
            indent = "" if kind is not None else "  "
            typer.echo(f"{indent}{name:<{width}}  {description}".rstrip())


def entries(kind: Kind) -> list[tuple[str, str]]:
    """Return (name, description) of everything of a kind."""
    from mil_cli.recipe.locations import configs_folder, recipes_folder

    if kind is Kind.RECIPES:
        folder = recipes_folder()
        return [(_from_here(file), describe(file)) for file in sorted(folder.rglob("[!_]*.yaml"))]
    folder = configs_folder() / ("stage" if kind is Kind.STAGES else _GROUPS[kind])
    return [
        (str(file.relative_to(folder).with_suffix("")), describe(file)) for file in sorted(folder.rglob("[!_]*.yaml"))
    ]


def _from_here(file: Path) -> str:
    """Return the path as it is typed from the present folder."""
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def describe(file: Path) -> str:
    """Return the first comment of a YAML file, up to its first full stop."""
    words: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ").strip()
        if text.startswith("@package"):
            continue
        if not text:
            break
        words.append(text)
    return " ".join(words).partition(". ")[0].rstrip(".")
