"""The section ``rank``: which architectures ``mil rank`` assesses, and how it ranks them."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from mil_cli.assess.columns import Columns
from mil_cli.assess.prediction import FEWEST
from mil_cli.assess.selection import RankConfig, RankMethod
from mil_cli.errors import DataError, MilError, RecipeError, RecipeErrors, did_you_mean
from mil_cli.models.source import resolve_path
from mil_cli.recipe.compose import check_path, compose
from mil_cli.recipe.load import build_recipe, table_outline
from mil_cli.recipe.problems import validate
from mil_cli.recipe.schema import Recipe
from mil_cli.training.config import TrainerConfig
from mil_cli.units import parse_count

Count = Annotated[float, BeforeValidator(parse_count), Field(gt=0, allow_inf_nan=False)]


class PartialTraining(BaseModel):
    """A short training of every architecture, of which predictors read how it went; none is stopped early.

    Attributes:
        epochs: Passes.
        samples: Samples of `train` in each pass, other ones in each; None: all.
        resolution: Share of their height and width that images have in this training and its evaluation; 1 leaves them.
        trainer: What else differs from the recipe's trainer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(2, ge=1)
    samples: int | None = Field(None, ge=1)
    resolution: float = Field(1.0, gt=0, le=1)
    trainer: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fixed_length(self) -> Self:
        if "epochs" in self.trainer:
            raise ValueError("the epochs of a partial training stand beside its trainer; write epochs: there")
        if "early_stopping" in self.trainer:
            raise ValueError("curves of unequal length cannot be compared; leave early_stopping out")
        return self


class SpaceRanking(RankMethod):
    """How the architectures of a space are ranked: a few are trained, and a predictor learns from them.

    Attributes:
        architectures: How many are drawn, evenly over the logarithm of their operations.
        macs: Fewest and most operations (multiply-accumulates of one sample) of those drawn; None: from those of the
            smallest architecture to those of the largest.
        scores: Scores without training that are taken of each; operations and parameters always are.
        partial: A short training of each; None: none.
        train: How many are trained as the recipe's trainer says.
        start: How many of them first, spread over the operations; the others are chosen in batches as `next` says.
            None: half of them.
        jobs: Processes, each of one thread, that assess and train at the same time.
    """

    architectures: int = Field(60, ge=FEWEST)
    macs: tuple[Count, Count] | None = None
    scores: tuple[str, ...] = ("synflow", "naswot")
    partial: PartialTraining | None = None
    train: int = Field(12, ge=FEWEST)
    start: int | None = Field(None, ge=FEWEST)
    jobs: int = Field(1, ge=1)

    @field_validator("macs")
    @classmethod
    def _smaller_first(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError("no architecture lies in this range; write the smaller number first, [low, high]")
        return value

    @field_validator("scores")
    @classmethod
    def _known_scores(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from mil_cli.assess.scores.registry import MEASURES, SIZES

        for name in names:
            if name in SIZES:
                raise ValueError(f"every architecture has {name} already; leave it out")
            if name not in MEASURES:
                hint = did_you_mean(name, set(MEASURES) - set(SIZES))
                raise ValueError(f"there is no score '{name}', {hint}; choose from those of docs/assessment.md")
        if len(set(names)) < len(names):
            raise ValueError("a score is named twice; leave one out")
        return names

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        if self.train > self.architectures:
            raise ValueError(
                f"{self.train} trainings of {self.architectures} architectures; set train to no more than architectures"
            )
        if self.first > self.train:
            raise ValueError(
                f"{self.start} of {self.train} trainings cannot be the first; set start to no more than train"
            )
        return self

    @property
    def first(self) -> int:
        """How many are trained before a predictor chooses."""
        return self.start if self.start is not None else max(FEWEST, self.train // 2)

    def config(self, seed: int) -> RankConfig:
        """Return the settings of the table's ranking."""
        return _config(self, seed)


class TableRanking(RankMethod):
    """How a table of architectures that others made is ranked.

    Attributes:
        table: The CSV file.
        columns: What its columns are; or a file that says so, such as the ``columns.json`` of a ranking.
    """

    table: Path
    columns: Columns

    def config(self, seed: int) -> RankConfig:
        """Return the settings of the table's ranking."""
        return _config(self, seed)


@dataclass(frozen=True)
class TableRecipe:
    """A recipe that ranks a table: it has no model, data or chain.

    Attributes:
        name: Names the folder of its runs.
        seed: Of all that is drawn.
        rank: How it is ranked; the table's path is absolute.
        resolved: The composed recipe as plain values.
    """

    name: str
    seed: int
    rank: TableRanking
    resolved: dict[str, Any]


def _config(method: RankMethod, seed: int) -> RankConfig:
    return RankConfig(**{name: getattr(method, name) for name in RankMethod.model_fields}, seed=seed)


def load_ranking(path: Path, overrides: Sequence[str] = ()) -> Recipe | TableRecipe:
    """Compose and validate a recipe of ``mil rank``.

    Args:
        path: The recipe's file.
        overrides: Hydra overrides such as ``rank.train=20``.

    Raises:
        RecipeError: The file cannot be read or composed, or has no section ``rank``.
        RecipeErrors: The composed recipe is not valid; every problem is listed with its key.
    """
    content = compose(path, overrides)
    section = content.get("rank")
    if section is None:
        hint = (
            "write rank: {architectures: 60, train: 12} for a model with choices, or rank: {table: ..., columns: ...}"
        )
        raise RecipeError("the recipe does not say what is ranked", where="rank", hint=hint)
    if isinstance(section, Mapping) and "table" in section:
        return _table_recipe(content, path=check_path(path))
    return build_recipe(content, path=path)


def _table_recipe(content: Mapping[str, Any], *, path: Path) -> TableRecipe:
    problems: list[MilError] = []
    outline = table_outline(content, problems)
    section = {**content["rank"]}
    try:
        if isinstance(section.get("columns"), str):
            section["columns"] = _read_columns(resolve_path(Path(section["columns"]), path.parent))
    except DataError as error:
        problems.append(error)
        section["columns"] = {"features": ("unknown",)}  # so that what else is wrong is told too
    rank = validate(TableRanking, section, where="rank", problems=problems)
    if problems or rank is None or outline is None:
        raise RecipeErrors(problems, where=str(path))
    rank = rank.model_copy(update={"table": resolve_path(rank.table, path.parent)})
    return TableRecipe(outline.name or path.stem, outline.seed, rank, dict(content))


def _read_columns(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "name the columns.json that mil rank wrote, or write the columns in the recipe"
        raise DataError(
            f"cannot read the columns: {error}", where="rank.columns", value=str(file), hint=hint
        ) from error


def space_ranking(
    content: Mapping[str, Any], trainer: TrainerConfig | None, *, problems: MutableSequence[MilError]
) -> SpaceRanking | None:
    """Validate the section ``rank`` of a recipe whose model is a space.

    Args:
        content: The section as composed.
        trainer: The recipe's trainer, if it is valid.
        problems: Where problems are added.
    """
    rank = validate(SpaceRanking, content, where="rank", problems=problems)
    if rank is None or trainer is None:
        return rank
    if trainer.evaluate_every != 1:
        hint = "set evaluate_every: 1; what comes of a training is read from its curve"
        problems.append(
            RecipeError(
                "a ranking needs whole curves", where="trainer.evaluate_every", value=trainer.evaluate_every, hint=hint
            )
        )
    if rank.partial is not None:
        _check_partial(rank.partial, trainer, problems)
    return rank


def _check_partial(partial: PartialTraining, trainer: TrainerConfig, problems: MutableSequence[MilError]) -> None:
    short = validate(TrainerConfig, trainer.merged(partial.trainer), where="rank.partial.trainer", problems=problems)
    if short is None:
        return
    if short.evaluate_every != 1:
        hint = "leave evaluate_every out"
        problems.append(RecipeError("a ranking needs whole curves", where="rank.partial.trainer", hint=hint))
    if partial.samples is not None and partial.samples < short.batch_size:
        hint = f"give at least {short.batch_size}, or set rank.partial.trainer.batch_size"
        problems.append(
            RecipeError(
                "fewer samples than a batch has", where="rank.partial.samples", value=partial.samples, hint=hint
            )
        )
