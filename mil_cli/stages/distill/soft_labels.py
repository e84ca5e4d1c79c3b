"""Distillation by soft labels: the student learns the teacher's softened outputs beside the true labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from mil_cli.errors import StageError
from mil_cli.stages.registry import StageConfig, stage
from mil_cli.training.layout import use_channels_last
from mil_cli.training.loop import Objective

if TYPE_CHECKING:
    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.task.base import Task


class SoftLabelsConfig(StageConfig):
    """Settings of distillation by soft labels.

    Attributes:
        teacher: None: the uncompressed model; else a `.pt2` file, or a model source (``_target_``, arguments,
            ``checkpoint``).
        temperature: T, by which the class scores of both are divided; no meaning for tasks without classes.
        weight: Share of the teacher's term in the loss, between 0 (labels only) and 1 (teacher only).
        trainer: Overrides of the recipe's trainer settings.
    """

    family: ClassVar[str] = "distill"
    method: ClassVar[str] = "soft_labels"

    teacher: str | dict[str, Any] | None = None
    temperature: float = Field(4.0, gt=0, allow_inf_nan=False)
    weight: float = Field(0.9, ge=0, le=1)
    trainer: dict[str, Any] = Field(default_factory=dict)


@stage(SoftLabelsConfig)
def soft_labels(model: Model, config: SoftLabelsConfig, context: Context) -> Model:
    """Train a copy of the model on (1 - weight) * loss + weight * distance to the teacher.

    Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network": for classes the distance is
    T^2 KL(teacher || student) of the outputs softened by T; other tasks have their own (`Task.distance`). The teacher
    is in evaluation mode, sees the same augmented batch, and gets no gradient.

    Args:
        model: The student; not changed.
        config: The settings.
        context: Gives task, data, trainer, seed, and the teacher.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: The teacher does not run on the student's inputs.
    """
    settings = context.trainer(config.trainer)
    chosen = context.original if config.teacher is None else context.source(config.teacher)
    teacher = chosen.clone().eval()
    use_channels_last(teacher, wanted=settings.channels_last)
    device = torch.device("cpu")
    if settings.accelerator != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        teacher.graph.to(device)
    objective = soft_label_objective(teacher, context.task, temperature=config.temperature, weight=config.weight)
    return context.fit(model, settings=settings, doing="distilling", objective=objective)


def soft_label_objective(teacher: Model, task: Task, *, temperature: float, weight: float) -> Objective:
    """Return the mix of the task's loss and the distance to a teacher, for the training loop.

    Args:
        teacher: In evaluation mode.
        task: Gives inputs, loss and distance.
        temperature: Softens class scores.
        weight: Share of the distance.

    Returns:
        (outputs, batch) -> (1 - weight) * loss + weight * distance.
    """

    def objective(outputs: Any, batch: Batch) -> torch.Tensor:
        if weight == 0:
            return task.loss(outputs, batch)
        args, kwargs = task.inputs(batch)
        with torch.no_grad():
            try:
                targets = teacher(*args, **kwargs)
            except RuntimeError as problem:
                raise StageError(
                    f"the teacher does not run on the student's inputs: {problem}",
                    where="teacher",
                    hint="the teacher must take the same inputs as the model",
                ) from problem
        distance = task.distance(outputs, targets, batch, temperature=temperature)
        if weight == 1:
            return distance
        return (1 - weight) * task.loss(outputs, batch) + weight * distance

    return objective
