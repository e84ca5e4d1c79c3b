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
    from mil_cli.training.objective import StepHook


class TrainedPruningConfig(StructuredPruningConfig):
    """Settings of a method that trains before it cuts.

    Attributes:
        regularise: Key of a train or distill stage of the recipe that the training is done by; None trains on the
            task's loss.
        trainer: Trainer settings for that, over that stage's own.
    """

    regularise: str | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)


class RegularisedPruningConfig(TrainedPruningConfig):
    """Settings of a method that trains with a penalty before it cuts.

    Attributes:
        strength: Weight of the penalty's gradient.
    """

    strength: float = Field(1e-4, gt=0, allow_inf_nan=False)


def trained_before(model: Model, config: TrainedPruningConfig, context: Context, before_step: StepHook) -> Model:
    """Return a model after the training that goes before its cut.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, training and checkpoints.
        before_step: Called before each step of the optimizer.
    """
    trainer = {**config.trainer, "early_stopping": None}  # the best on val would be those that were changed least
    return context.finetune(model, stage=config.regularise, name="regularise", trainer=trainer, before_step=before_step)


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
    trained = trained_before(model, config, context, penalty)
    context.note(quality_before_training=before, quality_after_training=context.evaluate(trained).value)
    return prune(trained, config, context, importance, known=known)
