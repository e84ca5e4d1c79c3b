"""Distillation by relations: the student's probabilities correlate with the teacher's, by sample and by class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mil_cli.stages.distill.distil import Lesson, TaughtConfig, beside_labels, distil
from mil_cli.stages.registry import stage
from mil_cli.task.divergence import check_same_shape
from mil_cli.training.objective import Objective

if TYPE_CHECKING:
    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_CONSTANT = 1e-3  # share of a row's size


class DistConfig(TaughtConfig):
    """Settings of distillation by relations.

    Attributes:
        beta: Weight of the relations between the classes of each sample.
        gamma: Weight of the relations between the samples of a batch, for each class.
        temperature: T, by which the class scores of both are divided.
        label_weight: Weight of the loss on the labels.
    """

    method: ClassVar[str] = "dist"
    version: ClassVar[int] = 2

    beta: float = Field(2.0, ge=0, allow_inf_nan=False)
    gamma: float = Field(2.0, ge=0, allow_inf_nan=False)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    label_weight: float = Field(1.0, ge=0, allow_inf_nan=False)


@stage(DistConfig)
def dist(model: Model, config: DistConfig, context: Context) -> Model:
    """Train the student on label_weight * loss + T^2 (beta * (1 - r by sample) + gamma * (1 - r by class)).

    Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher": r is Pearson's correlation of the two models'
    softened probabilities. A student far weaker than its teacher cannot match its probabilities, but it can order and
    space them alike.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, data, trainer, seed, and the teacher.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: The teacher does not run on the student's inputs, or the student cannot take the model's place.
        TaskError: The task has no classes, or no label for each position.
    """
    return distil(model, config, context, lambda lesson: dist_objective(lesson, config))


def dist_objective(lesson: Lesson, config: DistConfig) -> Objective:
    """Return (outputs, batch) -> the loss on the labels and both relations, each with its weight."""

    def relations(outputs: Any, batch: Batch) -> Tensor:
        pair = [lesson.task.class_scores(each, batch)[0] for each in (outputs, lesson.teacher(batch))]
        check_same_shape(*pair)
        if not len(pair[0]):  # no position of the batch has a label
            return pair[0].float().sum()
        student, teacher = (torch.softmax(scores.float() / config.temperature, 1) for scores in pair)
        between_classes = uncorrelated(student, teacher)
        between_samples = uncorrelated(student.T, teacher.T)
        return config.temperature**2 * (config.beta * between_classes + config.gamma * between_samples)

    return beside_labels(lesson.task, relations, label_weight=config.label_weight)


def uncorrelated(left: Tensor, right: Tensor) -> Tensor:
    """Return 1 - Pearson's correlation between the rows of two matrices, mean over the rows.

    It is 1, without a gradient, for rows that vary by less than a thousandth of their size, as those of a head do whose
    weights start at 0: the gradient of a correlation is that of the direction, which grows beyond bounds there.
    """
    one, other = (rows - rows.mean(1, keepdim=True) for rows in (left, right))
    vary = _varies(one, left) & _varies(other, right)
    return 1 - functional.cosine_similarity(one[vary], other[vary], dim=1).sum() / max(len(left), 1)


def _varies(centred: Tensor, rows: Tensor) -> Tensor:
    sizes: list[Tensor] = [torch.linalg.vector_norm(each.detach(), dim=1) for each in (centred, rows)]
    return sizes[0] > _CONSTANT * sizes[1]
