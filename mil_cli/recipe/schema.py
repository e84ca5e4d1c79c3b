"""The recipe as one validated, frozen, typed value: what everything after composition works from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mil_cli.models.source import ModelSource
from mil_cli.recipe.goals import Goals
from mil_cli.stages.registry import StageConfig
from mil_cli.training.config import TrainerConfig

NAME = r"^([^./\\\x00]|\.[^./\\\x00]|\.\.[^/\\\x00])[^/\\\x00]*$"
"""What a recipe or a stage may be called: it names a folder, so it is no path, and neither ``.`` nor ``..``."""


class MeasureConfig(BaseModel):
    """How figures are taken.

    Attributes:
        rounds: Rounds of the interleaved latency measurement; fewer than 60 would not carry an interval.
        sessions: How often each runtime session is rebuilt.
        per_stage: Also export and time the model after every stage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = Field(60, ge=60, le=100_000)
    sessions: int = Field(3, ge=1, le=100)
    per_stage: bool = False


class Recipe(BaseModel):
    """Everything that a run needs to know.

    Attributes:
        name: The recipe's name: its file's stem unless the recipe sets one.
        path: The recipe's file.
        root: The recipe's folder; relative paths and the user's modules are found there.
        seed: Every random choice follows from it.
        model: Where the uncompressed model comes from.
        data: ``_target_`` and its arguments.
        task: ``_target_`` and its arguments.
        device: The device profile's settings, before detection fills them.
        trainer: Settings of the training loop, which stages may override.
        baseline: The stage that trains the uncompressed model when it has no checkpoint; None takes it as it is.
        goals: Bounds on the final model.
        chain: Stage keys in the order in which they run.
        stages: Settings of every stage by key; those outside the chain serve as fine-tuners.
        measure: How figures are taken.
        rank: How the architectures of the model, a space, are ranked: a `SpaceRanking`, whose module takes seconds to
            import and is read for recipes with this section only.
        resolved: The composed recipe as plain values, for the report and the run's `recipe.yaml`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str = Field(min_length=1, pattern=NAME)
    path: Path
    root: Path
    seed: int = Field(0, ge=0, lt=2**63)
    model: ModelSource
    data: dict[str, Any]
    task: dict[str, Any]
    device: dict[str, Any]
    trainer: TrainerConfig
    baseline: StageConfig | None = None
    goals: Goals = Goals()
    chain: tuple[str, ...]
    stages: dict[str, StageConfig]
    measure: MeasureConfig = MeasureConfig()
    rank: BaseModel | None = None
    resolved: dict[str, Any]
