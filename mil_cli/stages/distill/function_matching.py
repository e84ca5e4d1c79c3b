"""Function matching: long training on mixed views, no labels; the student is to be the same function as the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils import _pytree as pytree

from mil_cli.data.changed import Changed, with_train
from mil_cli.errors import StageError
from mil_cli.stages.distill.distil import Lesson, TaughtConfig, report, student_of, teach, teacher_of
from mil_cli.stages.registry import stage
from mil_cli.training.objective import Objective

if TYPE_CHECKING:
    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class FunctionMatchingConfig(TaughtConfig):
    """Settings of function matching.

    Attributes:
        temperature: T, by which the class scores of both are divided; no meaning for tasks without classes.
        mixup: a of the distribution Beta(a, a) that each sample's share of itself is drawn from; 1 draws all shares
            alike, less leaves most samples nearly as they are.
        longer: How many times as many epochs as the trainer's settings say.
    """

    method: ClassVar[str] = "function_matching"

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    mixup: float = Field(1.0, gt=0, allow_inf_nan=False)
    longer: float = Field(4.0, gt=0, allow_inf_nan=False)


@stage(FunctionMatchingConfig)
def function_matching(model: Model, config: FunctionMatchingConfig, context: Context) -> Model:
    """Train the student on its distance to the teacher alone, on samples mixed with each other, for long.

    Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent". Teacher and student see the
    same view; each sample is mixed with another of its batch (Zhang et al. 2018, "mixup"), so that they are compared
    off the training samples too, where a label would mean nothing. The views that the data gives, crops say, come
    first.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, data, trainer, seed, and the teacher.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: No input can be mixed; the teacher does not run on the student's inputs, or the student cannot take
            the model's place.
    """
    student, teacher = student_of(model, config, context), teacher_of(config, context)
    settings = context.trainer(config.trainer)
    settings = settings.model_copy(update={"epochs": max(round(settings.epochs * config.longer), 1)})
    _check_inputs(context)
    data = context.data
    mixed = Changed(data.train, partial(mix, concentration=config.mixup), name=f"mixup {config.mixup}")
    result = teach(
        student,
        [teacher],
        context,
        lambda lesson: matching_objective(lesson, config),
        settings=settings,
        cache_gb=config.cache_gb,
        data=with_train(data, mixed),
    )
    return report(student, result, config, context, settings=settings)


def matching_objective(lesson: Lesson, config: FunctionMatchingConfig) -> Objective:
    """Return (outputs, batch) -> the distance to the lesson's teacher; labels are not read."""

    def objective(outputs: Any, batch: Batch) -> Tensor:
        return lesson.task.distance(outputs, lesson.teacher(batch), batch, temperature=config.temperature)

    return objective


def mix(batch: Batch, generator: torch.Generator, *, concentration: float) -> Batch:
    """Return a batch in which each sample is mixed with another one, in every real tensor by the same share.

    Args:
        batch: Tensors with the samples along axis 0; what is not real, labels say, stays that of the first sample.
        generator: Where partners and shares come from.
        concentration: a of Beta(a, a).
    """
    entries = list(batch.values() if isinstance(batch, Mapping) else batch)
    real = [place for place, entry in enumerate(entries) if isinstance(entry, Tensor) and entry.is_floating_point()]
    if not real:
        return batch
    samples = len(entries[real[0]])
    partners = torch.randperm(samples, generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    own = torch.from_numpy(np.random.default_rng(seed).beta(concentration, concentration, samples))
    for place in real:
        entry = entries[place]
        share = own.to(entry.dtype).view(-1, *[1] * (entry.ndim - 1))
        entries[place] = share * entry + (1 - share) * entry[partners]
    return dict(zip(batch, entries, strict=True)) if isinstance(batch, Mapping) else tuple(entries)


def _check_inputs(context: Context) -> None:
    batch = next(iter(context.data.train.batches(2)))
    leaves = pytree.tree_leaves(context.task.inputs(batch))
    if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        raise StageError(
            "function matching mixes samples with each other, and no input of the model holds real numbers",
            where=f"stages.{context.name}",
            hint="distil by soft_labels, which takes samples as they are",
        )
