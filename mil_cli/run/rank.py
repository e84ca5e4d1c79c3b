"""Ranks the architectures of a space or a table, and writes what came of it into the folder of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mil_cli.assess.rank_table import rank_table
from mil_cli.assess.selection import Ranking, as_json
from mil_cli.assess.table import read_table, write_table
from mil_cli.errors import RecipeError
from mil_cli.events import Progress
from mil_cli.files import write_json
from mil_cli.models.user_code import importable
from mil_cli.recipe.rank import SpaceRanking, TableRecipe
from mil_cli.run.cache import Cache, default_location
from mil_cli.run.campaign import Campaign
from mil_cli.run.directory import RANKING
from mil_cli.run.opening import open_run

if TYPE_CHECKING:
    from mil_cli.recipe.schema import Recipe

TABLE = "architectures.csv"
COLUMNS = "columns.json"


@dataclass(frozen=True)
class RankResult:
    """What a ranking left.

    Attributes:
        directory: The run's folder.
        ranking: The ranking.
        choices: Of each architecture that was drawn, by its name; empty for a table of others.
        report: The content of its `ranking.json`.
    """

    directory: Path
    ranking: Ranking
    choices: Mapping[str, Mapping[str, str | int]]
    report: dict[str, Any]


def rank_recipe(
    recipe: Recipe | TableRecipe,
    *,
    progress: Progress,
    out: Path | None = None,
    fresh: bool = False,
    cache_location: Path | None = None,
    base: Path | None = None,
    now: Callable[[], datetime] = datetime.now,
) -> RankResult:
    """Rank the architectures of a recipe's space or table, and write the run's folder.

    Args:
        recipe: The validated recipe.
        progress: Where work is reported.
        out: The run's folder; a dated one below ``runs/`` if None.
        fresh: Assess and train anew what the cache has.
        cache_location: The cache; ``$MIL_CACHE`` or the user's cache folder if None.
        base: Where ``runs/`` is; the present folder if None.
        now: The clock that names and dates the run.

    Raises:
        MilError: Something that the user can mend; what was reached is kept, the same command goes on.
    """
    with open_run(recipe.name, recipe.resolved, progress=progress, out=out, base=base or Path.cwd(), now=now) as (
        directory,
        log,
    ):
        if isinstance(recipe, TableRecipe):
            table = read_table(recipe.rank.table, recipe.rank.columns)
            choices: dict[str, dict[str, str | int]] = {}
            config = recipe.rank.config(recipe.seed)
        else:
            settings = recipe.rank
            if not isinstance(settings, SpaceRanking):
                raise RecipeError(
                    "the recipe does not say what is ranked", where="rank", hint="write rank: {train: 12}"
                )
            cache = Cache(cache_location or default_location(), log)
            with importable(recipe.root):
                campaign = Campaign.begin(recipe, settings, cache=cache, fresh=fresh, progress=log)
                table = campaign.carry_out()
            choices, config = campaign.choices, settings.config(recipe.seed)
        write_table(table, directory.path / TABLE)
        write_json(directory.path / COLUMNS, table.columns.model_dump(mode="json"))
        ranking = rank_table(table, config, progress=log)
        report = {"name": recipe.name, "recipe": recipe.resolved, **as_json(ranking), "choices": choices}
        write_json(directory.path / RANKING, report)
    return RankResult(directory.path, ranking, choices, report)
