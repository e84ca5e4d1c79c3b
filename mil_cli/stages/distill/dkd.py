"""Decoupled distillation: what a teacher says of the right class and of the others, each with a weight of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mil_cli.stages.distill.distil import Lesson, TaughtConfig, beside_labels, distil
from mil_cli.stages.registry import stage
from mil_cli.task.divergence import check_same_shape
from mil_cli.training.objective import Objective

if TYPE_CHECKING:
    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class DkdConfig(TaughtConfig):
    """Settings of decoupled distillation.

    Attributes:
        alpha: Weight of the part about the right class against all others together.
        beta: Weight of the part about the others among themselves.
        temperature: T, by which the class scores of both are divided.
        label_weight: Weight of the loss on the labels; it is not lowered for the others' sake.
        warmup: Share of the steps over which the weight of both parts rises from 0.
    """

    method: ClassVar[str] = "dkd"

    alpha: float = Field(1.0, ge=0, allow_inf_nan=False)
    beta: float = Field(8.0, ge=0, allow_inf_nan=False)
    temperature: float = Field(4.0, gt=0, allow_inf_nan=False)
    label_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    warmup: float = Field(0.1, ge=0, lt=1)


@stage(DkdConfig)
def dkd(model: Model, config: DkdConfig, context: Context) -> Model:
    """Train the student on label_weight * loss + warm-up * T^2 (alpha * target part + beta * part of the others).

    Zhao et al. 2022, "Decoupled Knowledge Distillation": the divergence of soft labels is the sum of these parts, the
    second weighted by the teacher's doubt of the right class, so that it fades where the teacher is sure; here it keeps
    its weight. Their warm-up rises epoch by epoch over the first 20 of 240, here it rises step by step.

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
    return distil(model, config, context, lambda lesson: dkd_objective(lesson, config))


def dkd_objective(lesson: Lesson, config: DkdConfig) -> Objective:
    """Return (outputs, batch) -> the loss on the labels and both parts, each with its weight."""
    rise = config.warmup * lesson.running.total_steps

    def parts(outputs: Any, batch: Batch) -> Tensor:
        student, labels = lesson.task.class_scores(outputs, batch)
        teacher, _ = lesson.task.class_scores(lesson.teacher(batch), batch)
        target, others = decoupled(student, teacher, labels, temperature=config.temperature)
        reached = min((lesson.running.steps() + 1) / rise, 1.0) if rise else 1.0
        total = (config.alpha * target + config.beta * others).sum() / max(len(labels), 1)
        return reached * config.temperature**2 * total

    return beside_labels(lesson.task, parts, label_weight=config.label_weight)


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the divergence KL(teacher || student) in its two parts.

    With p the teacher's softened probability of the label, KL = target + (1 - p) * others.

    Args:
        student: Class scores before softmax; shape (positions, classes).
        teacher: The same.
        labels: The right class of each position.
        temperature: T.

    Returns:
        The divergences between the two probabilities right or not, and between the probabilities of the other classes
        if it is one of them; float32 of shape (positions,), in nats, without the factor T^2.

    Raises:
        TaskError: The shapes differ.
    """
    check_same_shape(student, teacher)
    right = torch.zeros_like(student, dtype=torch.bool).scatter_(1, labels[:, None], True)

    def split(scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return log probabilities of right and not, and those of the others among themselves."""
        logs = torch.log_softmax(scores.float() / temperature, 1)
        others = logs[~right].reshape(len(logs), logs.shape[1] - 1)
        wrong = torch.logsumexp(others, 1, keepdim=True)
        return torch.cat([logs[right][:, None], wrong], 1), others - wrong

    pairs = zip(split(student), split(teacher), strict=True)
    target, others = ((its.exp() * (its - own)).sum(1) for own, its in pairs)
    return target, others
