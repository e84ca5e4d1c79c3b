"""Plain training on the task's loss: the baseline where there is no checkpoint, and fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mil_cli.stages.registry import StageConfig, stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class SupervisedConfig(StageConfig):
    """Settings of plain training.

    Attributes:
        trainer: Overrides of the recipe's trainer settings.
    """

    family: ClassVar[str] = "train"
    method: ClassVar[str] = "supervised"

    trainer: dict[str, Any] = Field(default_factory=dict)


@stage(SupervisedConfig)
def supervised(model: Model, config: SupervisedConfig, context: Context) -> Model:
    """Train a copy of the model on the task's loss.

    Args:
        model: Where to start.
        config: The settings.
        context: Gives task, data, trainer and seed.

    Returns:
        The trained model, in evaluation mode.
    """
    return context.fit(model, settings=context.trainer(config.trainer), doing="training")
