"""Distillation by several teachers: by the mean of what they say, or by one that is drawn at each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mil_cli.data.base import mix_seed
from mil_cli.errors import StageError
from mil_cli.stages.distill.distil import DistillConfig, KeepingConfig, Lesson, Source, mixed, report, student_of, teach
from mil_cli.stages.judging import mean_loss
from mil_cli.stages.registry import stage
from mil_cli.training.objective import Objective

if TYPE_CHECKING:
    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class EnsembleConfig(KeepingConfig, DistillConfig):
    """Settings of distillation by several teachers.

    Attributes:
        teachers: Two or more sources; None among them is the uncompressed model.
        weights: One for each teacher, at least 0; None: all alike; ``val``: in inverse proportion to its loss on val.
        mode: ``mean``: the weighted mean of all teachers' outputs, of probabilities where there are classes;
            ``one_per_batch``: one teacher is drawn by the weights at each step, and the others do not run.
        temperature: T, by which the class scores of all are divided; no meaning for tasks without classes.
        weight: Share of the teachers' term in the loss, between 0 (labels only) and 1 (teachers only).
    """

    method: ClassVar[str] = "ensemble"

    teachers: tuple[Source | None, ...] = ()
    weights: tuple[float, ...] | Literal["val"] | None = None
    mode: Literal["mean", "one_per_batch"] = "mean"
    temperature: float = Field(4.0, gt=0, allow_inf_nan=False)
    weight: float = Field(0.9, ge=0, le=1)

    @model_validator(mode="after")
    def _check_teachers(self) -> Self:
        if len(self.teachers) < 2:
            raise ValueError(f"teachers needs two or more, and has {len(self.teachers)}; soft_labels takes one teacher")
        if isinstance(self.weights, tuple):
            if len(self.weights) != len(self.teachers):
                raise ValueError(f"there are {len(self.weights)} weights for {len(self.teachers)} teachers")
            if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights) or not sum(self.weights):
                raise ValueError(f"weights are finite, at least 0 and not all 0, and are {list(self.weights)}")
        return self


@stage(EnsembleConfig)
def ensemble(model: Model, config: EnsembleConfig, context: Context) -> Model:
    """Train the student on (1 - weight) * loss + weight * distance to the teachers.

    Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 3; one teacher at a time as
    in Fukuda et al. 2017, "Efficient Knowledge Distillation from an Ensemble of Teachers". Probabilities are averaged
    at the temperature, not logits, whose scale differs between models that were trained apart.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, data, trainer, seed, and the teachers.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: A teacher does not run on the student's inputs, or has no loss on val to be weighed by; the student
            cannot take the model's place.
        TaskError: The teachers' outputs do not fit each other.
    """
    student = student_of(model, config, context)
    teachers = [context.original if source is None else context.source(source) for source in config.teachers]
    weights = teacher_weights(teachers, config, context)
    settings, seed = context.trainer(config.trainer), context.seed
    result = teach(
        student,
        teachers,
        context,
        lambda lesson: ensemble_objective(lesson, config, weights=weights, seed=seed),
        settings=settings,
        cache_gb=config.cache_gb,
    )
    context.note(teacher_weights=weights)
    return report(student, result, config, context, settings=settings)


def ensemble_objective(lesson: Lesson, config: EnsembleConfig, *, weights: Sequence[float], seed: int) -> Objective:
    """Return (outputs, batch) -> (1 - weight) * loss + weight * distance to the lesson's teachers.

    Args:
        lesson: Task, training and teachers.
        config: The settings.
        weights: One for each teacher, of sum 1.
        seed: What teachers are drawn by, together with the number of the step.
    """
    chances = torch.tensor(weights, dtype=torch.float64)

    def taught(batch: Batch) -> Any:
        if config.mode == "one_per_batch":
            generator = torch.Generator().manual_seed(mix_seed(seed, lesson.running.steps()))
            return lesson.teachers[int(torch.multinomial(chances, 1, generator=generator))](batch)
        outputs = [teacher(batch) for teacher in lesson.teachers]
        return lesson.task.combine(outputs, weights, temperature=config.temperature)

    def distance(outputs: Any, batch: Batch) -> Tensor:
        return lesson.task.distance(outputs, taught(batch), batch, temperature=config.temperature)

    return mixed(lesson.task, distance, weight=config.weight)


def teacher_weights(teachers: Sequence[Model], config: EnsembleConfig, context: Context) -> list[float]:
    """Return the weight of each teacher; they add up to 1.

    Raises:
        StageError: They are weighed by their loss on val, and it is not above 0 and finite.
    """
    if config.weights is None:
        shares = [1.0] * len(teachers)
    elif isinstance(config.weights, tuple):
        shares = list(config.weights)
    else:
        losses = [mean_loss(teacher.clone().eval(), context, samples=len(context.data.val)) for teacher in teachers]
        if not all(0 < loss < math.inf for loss in losses):
            raise StageError(
                "teachers are weighed by the inverse of their loss on val, which must be above 0 and finite",
                where=f"stages.{context.name}.weights",
                value=losses,
                hint="give the weights as a list, one for each teacher",
            )
        context.note(teacher_losses=losses)
        shares = [1 / loss for loss in losses]
    return [share / sum(shares) for share in shares]
