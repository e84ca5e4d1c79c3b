"""What all distillation shares: students and teachers by their settings, the training, and the plain one beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeAlias

import torch
from pydantic import Field

from mil_cli.errors import ModelError, StageError
from mil_cli.stages.distill.convergence import compare
from mil_cli.stages.distill.teacher import Memory, Teacher, answers_by_sample, views_repeat
from mil_cli.stages.registry import StageConfig
from mil_cli.training.evaluate import fixed_batch
from mil_cli.training.layout import place
from mil_cli.training.objective import Objective, Running

if TYPE_CHECKING:
    from torch import nn

    from mil_cli.data.base import Batch, Data
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.task.base import Task
    from mil_cli.training.config import TrainerConfig
    from mil_cli.training.loop import FitResult

_FIRST_SAMPLES = 2

Source: TypeAlias = str | dict[str, Any]
"""A `.pt2` file, or a model source: ``_target_`` with its arguments and ``checkpoint``."""


class StudentConfig(StageConfig):
    """Settings of every distillation, also of one without the recipe's data.

    Attributes:
        student: None: the model in the chain; else a source of another one, which takes its place.
        trainer: Overrides of the recipe's trainer settings.
    """

    family: ClassVar[str] = "distill"

    student: Source | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)

    def for_finetuning(self) -> Self:
        """Return the settings without what only a chain has use for."""
        return self.model_copy(update={"student": None})


class DistillConfig(StudentConfig):
    """Settings of every distillation on the recipe's data.

    Attributes:
        beside_plain: Whether to train the same student plainly too, for as many steps, and to report both curves and
            how many steps each needs to reach a quality.
    """

    beside_plain: bool = False

    def for_finetuning(self) -> Self:
        """Return the settings without what only a chain has use for."""
        return self.model_copy(update={"student": None, "beside_plain": False})


class HasTeacher(Protocol):
    """Settings that name a teacher."""

    @property
    def teacher(self) -> Source | None:
        """None: the uncompressed model; else a source of another one."""
        ...


class KeepingConfig(StageConfig):
    """Settings of distillation whose teachers' outputs may be kept.

    Attributes:
        cache_gb: Where training gives the same views in each epoch, the teachers' outputs are kept on disk, up to so
            many GB together (0: computed each time).
    """

    cache_gb: float = Field(2.0, ge=0, allow_inf_nan=False)


class TaughtConfig(KeepingConfig, DistillConfig):
    """Settings of distillation from a teacher.

    Attributes:
        teacher: None: the uncompressed model; else a source of another one.
    """

    teacher: Source | None = None


@dataclass(frozen=True)
class Lesson:
    """What an objective of distillation is made of.

    Attributes:
        task: Gives inputs, loss and distance.
        running: The training under way.
        teachers: The teachers, in the order given.
    """

    task: Task
    running: Running
    teachers: Sequence[Teacher]

    @property
    def teacher(self) -> Teacher:
        """The first, where there is one."""
        return self.teachers[0]


Bind: TypeAlias = Callable[[Lesson], Objective]
"""Makes the objective of a lesson."""


def student_of(model: Model, config: StudentConfig, context: Context) -> Model:
    """Return the model to train: that of the chain, or the source that takes its place.

    Raises:
        StageError: The source takes or gives something else than the model of the chain.
    """
    if config.student is None:
        return model
    student = context.source(config.student).clone()
    try:
        student.spec = student.spec.in_place_of(model.spec)
    except ModelError as problem:
        raise StageError(
            f"the student cannot take the model's place: {problem.what}",
            where=f"stages.{context.name}.student",
            value=config.student,
            hint=problem.hint,
        ) from problem
    return student


def teacher_of(config: HasTeacher, context: Context) -> Model:
    """Return the teacher; not to be changed."""
    return context.original if config.teacher is None else context.source(config.teacher)


def distil(model: Model, config: TaughtConfig, context: Context, bind: Bind) -> Model:
    """Train the student of `config` by one teacher's outputs: what a method of one training calls.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives everything else.
        bind: Makes the objective.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: Teacher or student do not fit the model.
    """
    student, teacher = student_of(model, config, context), teacher_of(config, context)
    settings = context.trainer(config.trainer)
    result = teach(student, [teacher], context, bind, settings=settings, cache_gb=config.cache_gb)
    return report(student, result, config, context, settings=settings)


def teach(
    student: Model,
    teachers: Sequence[Model],
    context: Context,
    bind: Bind,
    *,
    settings: TrainerConfig,
    cache_gb: float,
    slot: str = "fit",
    doing: str = "distilling",
    taps: Sequence[str] = (),
    teacher_taps: Sequence[str] = (),
    companions: nn.Module | None = None,
    data: Data | None = None,
) -> FitResult:
    """Train a copy of a student by teachers, resumably; notes nothing but whether answers were kept.

    Args:
        student: Where to start.
        teachers: Not changed; each sees the student's own batch in evaluation mode and gets no gradient.
        context: Gives task, data, seed and checkpoints.
        bind: Makes the objective.
        settings: The trainer's settings.
        cache_gb: Bound of what is kept of the teachers' outputs, together.
        slot: Where the training's checkpoint is kept.
        doing: What progress calls it.
        taps: Module paths of the student that the objective reads.
        teacher_taps: Those of every teacher; answers are not kept where they are read.
        companions: Modules that are trained along and dropped.
        data: The splits, where `train` is not that of the recipe; see `Context.train`.

    Raises:
        StageError: A teacher does not run on the student's inputs; told before training.
    """
    seen = context.data if data is None else data
    with ExitStack() as stack:
        keeps = bool(teachers) and not teacher_taps and cache_gb > 0
        kept = keeps and views_repeat(seen, context.task, seed=context.seed)
        limit = int(cache_gb * 1e9) // max(len(teachers), 1)
        memories = [
            Memory(
                stack.enter_context(context.scratch(f"{slot}-teacher{index}")), limit=limit, progress=context.progress
            )
            if kept and answers_by_sample(teacher)
            else None
            for index, teacher in enumerate(teachers)
        ]
        if teachers:
            context.note(teacher_outputs_kept=any(memory is not None for memory in memories))
        where = f"stages.{context.name}.{'teacher' if len(teachers) == 1 else 'teachers'}"
        first = next(iter(seen.train.batches(_first_samples([student, *teachers]))))

        def begin(running: Running) -> Objective:
            at_work = [
                Teacher(teacher, context.task, running, taps=teacher_taps, memory=memory, where=where)
                for teacher, memory in zip(teachers, memories, strict=True)
            ]
            for teacher in at_work:
                teacher.study(place(first, device=running.device, channels_last=running.channels_last))
            return bind(Lesson(context.task, running, at_work))

        return context.train(
            student, settings=settings, doing=doing, slot=slot, bind=begin, taps=taps, companions=companions, data=seen
        )


def _first_samples(models: Iterable[Model]) -> int:
    """Return on how many samples models are tried: as many as those want that take batches of one size only."""
    return next((size for model in models if (size := fixed_batch(model)) is not None), _FIRST_SAMPLES)


def report(
    student: Model,
    result: FitResult,
    config: DistillConfig,
    context: Context,
    *,
    settings: TrainerConfig,
    course: FitResult | None = None,
) -> Model:
    """Note the history of a training, and that of the same student's plain training where it is asked for.

    Args:
        student: Where the training started.
        result: What it gave.
        config: The settings.
        context: Takes the notes.
        settings: Of both trainings.
        course: What is compared with plain training, where it is not `result` alone that was trained; see `after`.

    Returns:
        The trained model.
    """
    context.note(history=result.history, stopped=result.stopped)
    if config.beside_plain:
        plain = context.train(student, settings=settings, doing="training the student plainly", slot="plain")
        taught = result if course is None else course
        context.note(convergence=compare(taught, plain, higher_is_better=context.task.higher_is_better))
    return result.model


def mixed(
    task: Task, distance: Callable[[Any, Batch], torch.Tensor], *, weight: float
) -> Callable[[Any, Batch], torch.Tensor]:
    """Return ``(1 - weight) * loss + weight * distance``, each computed only where it counts.

    Args:
        task: Gives the loss on the labels.
        distance: (outputs, batch) -> how far the student is from what it is taught, a scalar.
        weight: Between 0 (labels only) and 1 (teacher only).
    """

    def objective(outputs: Any, batch: Batch) -> torch.Tensor:
        if weight == 0:
            return task.loss(outputs, batch)
        if weight == 1:
            return distance(outputs, batch)
        return (1 - weight) * task.loss(outputs, batch) + weight * distance(outputs, batch)

    return objective


def beside_labels(
    task: Task, term: Callable[[Any, Batch], torch.Tensor], *, label_weight: float
) -> Callable[[Any, Batch], torch.Tensor]:
    """Return ``label_weight * loss + term``, the loss computed only where it counts.

    Args:
        task: Gives the loss on the labels.
        term: (outputs, batch) -> what distillation adds, a scalar with its own weights in it.
        label_weight: At least 0.
    """

    def objective(outputs: Any, batch: Batch) -> torch.Tensor:
        if label_weight == 0:
            return term(outputs, batch)
        return label_weight * task.loss(outputs, batch) + term(outputs, batch)

    return objective
