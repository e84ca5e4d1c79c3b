"""Which column of a table of architectures is what."""

from __future__ import annotations

from collections import Counter
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Seconds(BaseModel):
    """Columns that say how many seconds one architecture took.

    Attributes:
        scores: For its cheap scores.
        partial: For its partial trainings.
        training: For its whole training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    training: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.scores, *self.partial, *self.training)


class Columns(BaseModel):
    """What the columns of a table of architectures are; others are not read.

    Attributes:
        id: Names the architecture; rows of the same are merged.
        features: Numbers that describe it.
        categories: Choices that describe it, such as the kind of an operation; one-hot.
        scores: Scores without training. An overflow to infinity is allowed, and so is a missing one.
        partial: What is known after a short training, such as a learning curve's sum of losses.
        quality: What a whole training reaches. Empty: not trained yet; ``nan`` or ``inf``: the training collapsed.
        higher_is_better: Whether more of it is better.
        cpu_seconds: Processor time that was spent.
        wall_seconds: Time that passed.
        separator: What stands between two cells.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = "id"
    features: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    quality: str = "quality"
    higher_is_better: bool = True
    cpu_seconds: Seconds = Seconds()
    wall_seconds: Seconds = Seconds()
    separator: str = Field(",", min_length=1, max_length=1)

    @model_validator(mode="after")
    def _each_is_one_thing(self) -> Self:
        twice = [name for name, count in Counter(self.all).items() if count > 1]
        if twice:
            raise ValueError(f"the column '{twice[0]}' is named twice; write each column under one key, once")
        if not (self.numeric or self.categories):
            raise ValueError("nothing describes an architecture; write columns under features, scores or partial")
        return self

    @property
    def numeric(self) -> tuple[str, ...]:
        """The columns of numbers that a predictor reads."""
        return (*self.features, *self.scores, *self.partial)

    @property
    def seconds(self) -> tuple[str, ...]:
        """The columns of seconds."""
        return (*self.cpu_seconds.all, *self.wall_seconds.all)

    @property
    def all(self) -> tuple[str, ...]:
        """All columns, the quality's last but for seconds."""
        return (self.id, *self.numeric, *self.categories, self.quality, *self.seconds)
