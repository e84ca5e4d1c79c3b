"""Born-again training: generations of one student, each taught by the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from mil_cli.stages.distill.convergence import after, steps_of
from mil_cli.stages.distill.distil import DistillConfig, KeepingConfig, report, student_of, teach
from mil_cli.stages.distill.soft_labels import SoftLabelsConfig, soft_label_objective
from mil_cli.stages.judging import with_fresh_statistics
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class BornAgainConfig(KeepingConfig, DistillConfig):
    """Settings of born-again training.

    Attributes:
        generations: How many learn from the one before, after a first one that learns from the labels alone.
        final: What comes out: ``best``: the generation that is best on val; ``last``; or ``mean``: the mean of the
            weights of all generations with a teacher, if it is better on val than each of them, else the best of them.
        temperature: T, by which the class scores are divided; no meaning for tasks without classes.
        weight: Share of the teacher's term in each loss.
        recalibrate_samples: Training samples from which the statistics of batch norms are taken for the mean.
    """

    method: ClassVar[str] = "born_again"
    version: ClassVar[int] = 2

    generations: int = Field(2, ge=1, le=20)
    final: Literal["best", "last", "mean"] = "best"
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    weight: float = Field(0.5, ge=0, le=1)
    recalibrate_samples: int = Field(512, ge=0)


@stage(BornAgainConfig)
def born_again(model: Model, config: BornAgainConfig, context: Context) -> Model:
    """Train the student once on the labels, then again and again from the same start by the generation before.

    Furlanello et al. 2018, "Born Again Neural Networks": a student of the teacher's own size often passes it. There
    generations start from random weights; here from the student's, whatever they are, and it is the same for all.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, data, trainer and seed.

    Returns:
        The generation that `final` says, in evaluation mode.

    Raises:
        StageError: The student cannot take the model's place.
    """
    student, settings = student_of(model, config, context), context.trainer(config.trainer)
    taught = SoftLabelsConfig(temperature=config.temperature, weight=config.weight)
    # The slot of the plain training beside, which is the same one.
    first = context.train(student, settings=settings, doing="training generation 0", slot="plain")
    results = [first]
    for generation in range(1, config.generations + 1):
        results.append(
            teach(
                student,
                [results[-1].model],
                context,
                lambda lesson: soft_label_objective(lesson, taught),
                settings=settings,
                cache_gb=config.cache_gb,
                slot=f"generation{generation}",
                doing=f"training generation {generation} of {config.generations}",
            )
        )
    qualities = [context.evaluate(result.model) for result in results]
    best = 0
    for number, quality in enumerate(qualities):
        if quality.better_than(qualities[best]):
            best = number
    facts: dict[str, object] = {"qualities": [quality.value for quality in qualities]}
    kept = best if config.final != "last" else config.generations
    result = results[kept]
    course = after(results[:kept], result)
    if config.final == "mean":
        mean = mean_of_weights([each.model for each in results[1:]])
        mean = with_fresh_statistics(mean, context, samples=config.recalibrate_samples)
        quality = context.evaluate(mean)
        facts["quality_of_the_mean"] = quality.value
        if quality.better_than(qualities[best]):
            result = replace(result, model=mean)
            # It has no course of its own: it is there when all generations are.
            course = replace(result, history=[{"steps": steps_of(results), "val": quality.value}])
            facts["kept"] = "mean"
    context.note(generations={"kept": kept, **facts})
    # To choose among the generations all had to be trained.
    course = replace(course, seconds=sum(each.seconds for each in results))
    return report(student, result, config, context, settings=settings, course=course)


def mean_of_weights(models: Sequence[Model]) -> Model:
    """Return a model whose weights are the mean of those of models of one graph; what is not real is the last's."""
    result = models[-1].clone()
    states = [model.state_dict() for model in models]
    means = {
        name: torch.stack([state[name] for state in states]).mean(0) if last.is_floating_point() else last
        for name, last in states[-1].items()
    }
    result.load_state_dict(means)
    return result
