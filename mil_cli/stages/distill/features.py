"""What distillation by features shares: the layers compared, the training, and the loss that joins both terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import Field
from torch import Tensor, nn

from mil_cli.stages.distill.distil import Lesson, TaughtConfig, mixed, report, student_of, teach, teacher_of
from mil_cli.stages.distill.pairs import Pair, pair_layers
from mil_cli.training.objective import Objective

if TYPE_CHECKING:
    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

Difference: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(student's, teacher's feature), each of shape (batch, channels, *positions) -> how far they are apart, a scalar."""


class FeatureConfig(TaughtConfig):
    """Settings of distillation by features inside the models.

    Attributes:
        temperature: T, by which the class scores of both are divided; no meaning for tasks without classes.
        weight: Share of the teacher's outputs in the loss, between 0 (labels only) and 1 (teacher only).
        feature_weight: What the mean difference of the features, added to that, is multiplied by.
        count: How many pairs of layers to find, at most.
        pairs: Module paths of the student and of the teacher whose outputs are compared, in place of those that would
            be found.
    """

    temperature: float = Field(4.0, gt=0, allow_inf_nan=False)
    weight: float = Field(0.9, ge=0, le=1)
    feature_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    count: int = Field(3, ge=1)
    pairs: dict[str, str] = Field(default_factory=dict)


def distil_features(
    model: Model,
    config: FeatureConfig,
    context: Context,
    difference: Callable[[Pair], Difference],
    *,
    mapped: bool = False,
) -> Model:
    """Train the student of `config` by its teacher's outputs and features: what a method calls.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives everything else.
        difference: Makes what tells how far the features of a pair are apart; a module is trained along and dropped.
        mapped: Whether the features must have more than one position.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: Teacher or student do not fit the model, or there is nothing to compare.
    """
    student, teacher = student_of(model, config, context), teacher_of(config, context)
    where = f"stages.{context.name}.pairs"
    pairs = pair_layers(student, teacher, given=config.pairs, count=config.count, mapped=mapped, where=where)
    context.note(pairs=[pair.facts() for pair in pairs])
    differences = [difference(pair) for pair in pairs]
    settings = context.trainer(config.trainer)
    result = teach(
        student,
        [teacher],
        context,
        lambda lesson: feature_objective(lesson, config, pairs, differences),
        settings=settings,
        cache_gb=config.cache_gb,
        taps=_each_once(pair.student.path for pair in pairs),
        teacher_taps=_each_once(pair.teacher.path for pair in pairs),
        companions=nn.ModuleList(module for module in differences if isinstance(module, nn.Module)),
    )
    return report(student, result, config, context, settings=settings)


def feature_objective(
    lesson: Lesson, config: FeatureConfig, pairs: Sequence[Pair], differences: Sequence[Difference]
) -> Objective:
    """Return (outputs, batch) -> the loss by outputs + feature_weight * the mean difference of the pairs."""

    def objective(outputs: Any, batch: Batch) -> Tensor:
        answers, taught = lesson.teacher.study(batch)
        learnt = lesson.running.tapped()

        def distance(outputs: Any, batch: Batch) -> Tensor:
            return lesson.task.distance(outputs, answers, batch, temperature=config.temperature)

        loss = mixed(lesson.task, distance, weight=config.weight)(outputs, batch)
        terms = [
            difference(pair.student.read(learnt), pair.teacher.read(taught))
            for pair, difference in zip(pairs, differences, strict=True)
        ]
        return loss + config.feature_weight / len(terms) * sum(terms[1:], terms[0])

    return objective


def _each_once(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(paths))
