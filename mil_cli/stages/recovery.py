"""What stages share that may have what they made fine-tuned by another stage of the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from mil_cli.stages.registry import StageConfig

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class RecoveringConfig(StageConfig):
    """Settings of a stage that may have what it made fine-tuned.

    Attributes:
        recover: Key of a train or distill stage of the recipe that fine-tunes what this one made; None does not.
        recover_trainer: Trainer settings for that, over that stage's own.
    """

    recover: str | None = None
    recover_trainer: dict[str, Any] = Field(default_factory=dict)

    def recovered(self, model: Model, context: Context, *, name: str) -> Model:
        """Return a model fine-tuned as these settings say, or as it is where they say nothing.

        Args:
            model: What the stage made; not changed.
            context: Of the stage.
            name: Tells this training from others of the same stage.

        Raises:
            StageError: There is no such stage, or it does not train.
        """
        if self.recover is None:
            return model
        return context.finetune(model, stage=self.recover, name=name, trainer=self.recover_trainer)
