"""Distillation by soft labels: the student learns the teacher's softened outputs beside the true labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mil_cli.stages.distill.distil import Lesson, TaughtConfig, distil, mixed
from mil_cli.stages.registry import stage
from mil_cli.training.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class SoftLabelsConfig(TaughtConfig):
    """Settings of distillation by soft labels.

    Attributes:
        temperature: T, by which the class scores of both are divided; no meaning for tasks without classes.
        weight: Share of the teacher's term in the loss, between 0 (labels only) and 1 (teacher only).
    """

    method: ClassVar[str] = "soft_labels"

    temperature: float = Field(4.0, gt=0, allow_inf_nan=False)
    weight: float = Field(0.9, ge=0, le=1)


@stage(SoftLabelsConfig)
def soft_labels(model: Model, config: SoftLabelsConfig, context: Context) -> Model:
    """Train the student on (1 - weight) * loss + weight * distance to the teacher.

    Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network": for classes the distance is
    T^2 KL(teacher || student) of the outputs softened by T; other tasks have their own (`Task.distance`). The teacher
    is in evaluation mode, sees the same augmented batch, and gets no gradient.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, data, trainer, seed, and the teacher.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: The teacher does not run on the student's inputs, or the student cannot take the model's place.
    """
    return distil(model, config, context, lambda lesson: soft_label_objective(lesson, config))


def soft_label_objective(lesson: Lesson, config: SoftLabelsConfig) -> Objective:
    """Return (outputs, batch) -> (1 - weight) * loss + weight * distance to the lesson's teacher."""

    def distance(outputs: Any, batch: Batch) -> Tensor:
        return lesson.task.distance(outputs, lesson.teacher(batch), batch, temperature=config.temperature)

    return mixed(lesson.task, distance, weight=config.weight)
