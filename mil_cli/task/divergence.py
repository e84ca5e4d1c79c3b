"""How far class scores are off: from those of another model, softened, and from labels."""

from __future__ import annotations

import torch
from torch.nn import functional

from mil_cli.errors import TaskError


def softened_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, temperature: float, axis: int = -1
) -> torch.Tensor:
    """Return T^2 KL(teacher_T || student_T) at each position; T^2 keeps the gradient's size as T grows.

    Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.1.

    Args:
        student_logits: Class scores before softmax; any shape.
        teacher_logits: The same shape.
        temperature: T, above 0.
        axis: The class axis.

    Returns:
        The divergence in nats times T^2, in the shape of the logits without the class axis, float32.

    Raises:
        TaskError: Shapes that differ, or a temperature that is not above 0.
    """
    if temperature <= 0:
        raise TaskError("the temperature must be above 0", where="temperature", value=temperature)
    check_same_shape(student_logits, teacher_logits)
    student = functional.log_softmax(student_logits.float() / temperature, dim=axis)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, dim=axis)
    return (teacher.exp() * (teacher - student)).sum(axis) * temperature**2


def check_same_shape(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Refuse outputs of a teacher that do not match the student's.

    Raises:
        TaskError: The shapes differ.
    """
    if student.shape != teacher.shape:
        raise TaskError(
            f"the teacher's output has shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}",
            where="teacher",
            hint="the teacher must give the same classes and resolution as the model",
        )


def counted_cross_entropy(
    scores: torch.Tensor, labels: torch.Tensor, *, ignore_index: int, label_smoothing: float
) -> torch.Tensor:
    """Return the mean cross-entropy in nats of the labels that count; 0 if none does, where torch gives NaN.

    Args:
        scores: ``(batch, classes, ...)``.
        labels: ``(batch, ...)``, class indices.
        ignore_index: The label that does not count.
        label_smoothing: Share of the uniform distribution in the target.
    """
    total = functional.cross_entropy(
        scores, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / (labels != ignore_index).sum().clamp(min=1)
