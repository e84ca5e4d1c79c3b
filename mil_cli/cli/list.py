"""``mil list``: what there is, one line each, and the settings of one of them, read from the shipped files."""

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
    name: Annotated[
        str | None, typer.Argument(help="One of them, such as prune/taylor: shows all its settings.")
    ] = None,
) -> None:
    """Show the stages, recipes, devices, models, data and tasks that there are, or the settings of one of them."""
    if kind is not None and name is not None:
        file = _file_of(kind, name)
        typer.echo(file.read_text(encoding="utf-8").rstrip() if kind is Kind.RECIPES else settings(file))
        return
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
    return [(name, describe(file)) for name, file in _files(kind).items()]


def _files(kind: Kind) -> dict[str, Path]:
    """Return name -> file of everything of a kind."""
    from mil_cli.recipe.locations import configs_folder, recipes_folder

    if kind is Kind.RECIPES:
        return {_from_here(file): file for file in sorted(recipes_folder().rglob("[!_]*.yaml"))}
    folder = configs_folder() / ("stage" if kind is Kind.STAGES else _GROUPS[kind])
    return {str(file.relative_to(folder).with_suffix("")): file for file in sorted(folder.rglob("[!_]*.yaml"))}


def _file_of(kind: Kind, name: str) -> Path:
    """Return the file of a name, or of the one name that ends so.

    Raises:
        RecipeError: There is none, or several.
    """
    files = _files(kind)
    wanted = name.removesuffix(".yaml")
    fitting = [one for one in files if f"/{one.removesuffix('.yaml')}".endswith(f"/{wanted}")]
    if len(fitting) == 1:
        return files[fitting[0]]
    from mil_cli.errors import RecipeError, did_you_mean

    hint = (
        f"name one of {', '.join(fitting)}"
        if fitting
        else did_you_mean(name, files if "/" in name else [file.stem for file in files.values()])
    )
    what = "several have this name" if fitting else "there is none of this name"
    raise RecipeError(what, where=f"mil list {kind.value}", value=name, hint=hint)


def settings(file: Path) -> str:
    """Return a file of settings with those that it takes over from the files it builds on, comments and all."""
    head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")][:1]
    return "\n".join([*head, *(line for block in _settings(file).values() for line in block)])


def _settings(file: Path) -> dict[str, list[str]]:
    """Return the lines of each setting of a file by its key, those of the files it builds on first."""
    blocks: dict[str, list[str]] = {}
    own: dict[str, list[str]] = {}
    above: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        key = line.partition(":")[0]
        if not line.strip() or (line.startswith("#") and not own):
            continue
        if line.startswith("#"):
            above.append(line)
        elif line.startswith((" ", "-")):
            own[next(reversed(own))] += [*above, line]
            above = []
        else:
            own[key] = [*above, line]
            above = []
    for line in own.pop("defaults", [])[1:]:
        base = line.partition("#")[0].strip(" -")
        if base.startswith("_") and base != "_self_":
            blocks.update(_settings(file.with_name(f"{base}.yaml")))
    return {**blocks, **own}


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
