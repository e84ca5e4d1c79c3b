"""What pruning methods share that first train a model with a penalty on what is going to be cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mil_cli.stages.prune.schedule import prune
from mil_cli.stages.prune.settings import StructuredPruningConfig

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.stages.prune.arrange import Importance
    from mil_cli.training.loop import StepHook


class RegularisedPruningConfig(StructuredPruningConfig):
    """Settings of a method that trains with a penalty before it cuts.

    Attributes:
        strength: Weight of the penalty's gradient.
        regularise: Key of a train or distill stage of the recipe that the penalised training is done by; None trains on
            the task's loss.
        trainer: Trainer settings for that, over that stage's own.
    """

    strength: float = Field(1e-4, gt=0, allow_inf_nan=False)
    regularise: str | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)


def train_and_prune(
    model: Model,
    config: RegularisedPruningConfig,
    context: Context,
    importance: Importance,
    penalty: StepHook,
    *,
    known: Mapping[str, float] | None = None,
) -> Model:
    """Train a model with a penalty on its gradients, then cut it down to its target.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, training and checkpoints.
        importance: Scores of the trained model's classes, by space.
        penalty: Adds its gradient before each step.
        known: A latency's table of operators, as far as it was measured already.

    Returns:
        The smaller model, in evaluation mode.
    """
    before = context.evaluate(model).value
    trainer = {**config.trainer, "early_stopping": None}  # the best on val would be those that are shrunk least
    trained = context.finetune(model, stage=config.regularise, name="regularise", trainer=trainer, before_step=penalty)
    context.note(quality_before_training=before, quality_after_training=context.evaluate(trained).value)
    return prune(trained, config, context, importance, known=known)
