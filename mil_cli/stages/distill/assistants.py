"""Distillation through teacher assistants: models between teacher and student, each taught by the one before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mil_cli.errors import StageError
from mil_cli.stages.distill.convergence import after
from mil_cli.stages.distill.distil import Source, TaughtConfig, report, student_of, teach, teacher_of
from mil_cli.stages.distill.soft_labels import SoftLabelsConfig, soft_label_objective
from mil_cli.stages.registry import StageConfig, stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_TRAINING_PASSES = 3
"""Forward passes that a training step costs: one forward, and a backward of about twice that."""


class AssistantsConfig(TaughtConfig):
    """Settings of distillation through assistants.

    Attributes:
        by: Key of a pruning stage of the recipe that cuts the assistants out of the teacher, whatever its own target
            and without its fine-tuning; or `assistants` are given.
        count: How many assistants it makes; their operations lie in equal ratios between teacher and student.
        assistants: Sources of assistants instead, from the largest to the smallest.
        budget: ``equal``: all trainings together cost as many operations as distilling the student directly would, for
            as many epochs as the trainer says; ``full``: each takes all the epochs.
        temperature: T, by which the class scores are divided; no meaning for tasks without classes.
        weight: Share of the teacher's term in each loss.
    """

    method: ClassVar[str] = "assistants"
    version: ClassVar[int] = 2

    by: str | None = None
    count: int = Field(1, ge=1, le=10)
    assistants: tuple[Source, ...] = ()
    budget: Literal["equal", "full"] = "equal"
    temperature: float = Field(4.0, gt=0, allow_inf_nan=False)
    weight: float = Field(0.9, ge=0, le=1)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.by is None) == (not self.assistants):
            given = "both are" if self.assistants else "neither is"
            raise ValueError(f"give either by, the pruning stage that makes assistants, or assistants; {given} given")
        return self

    def check_by(self, other: StageConfig, *, name: str) -> None:
        """Refuse a stage that makes no assistants."""
        if other.family != "prune" or "macs" not in type(other).model_fields:
            raise StageError(
                f"the stage '{self.by}' does not prune to a number of operations",
                where=f"stages.{name}.by",
                value=self.by,
                hint="name a stage of the family prune that takes macs, such as magnitude",
            )

    def for_finetuning(self) -> Self:
        """Return settings without assistants: what is fine-tuned learns from the teacher itself."""
        return super().for_finetuning().model_copy(update={"by": None, "assistants": ()})


@stage(AssistantsConfig)
def assistants(model: Model, config: AssistantsConfig, context: Context) -> Model:
    """Distil from the teacher to the largest assistant, from that to the next one, and from the last to the student.

    Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant": a student that is far smaller than
    its teacher learns more from a model between them.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, data, trainer, seed, the teacher, and the stage that cuts.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: Nothing lies between student and teacher, the stage `by` does not prune to a number of operations,
            or the epochs are too few to be shared.
    """
    student, teacher = student_of(model, config, context), teacher_of(config, context)
    learners = [*_between(teacher, student, config, context), student]
    macs = [each.macs() for each in (teacher, *learners)]
    settings = context.trainer(config.trainer)
    epochs = [settings.epochs] * len(learners)
    if config.budget == "equal":
        epochs = share_budget(settings.epochs, macs)
        if not min(epochs):
            raise StageError(
                f"{settings.epochs} epochs are too few to be shared among {len(learners)} trainings",
                where=f"stages.{context.name}.budget",
                value=config.budget,
                hint="raise trainer.epochs, lower count, or set budget: full",
            )
    taught = SoftLabelsConfig(temperature=config.temperature, weight=config.weight)
    direct = settings.epochs * _epoch_cost(macs[0], macs[-1])
    before, facts, results = teacher, [], []
    for number, (learner, passes) in enumerate(zip(learners, epochs, strict=True), start=1):
        last = number == len(learners)
        result = teach(
            learner,
            [before],
            context,
            lambda lesson: soft_label_objective(lesson, taught),
            settings=settings.model_copy(update={"epochs": passes}),
            cache_gb=config.cache_gb,
            slot="fit" if last else f"assistant{number}",
            doing="distilling" if last else f"distilling assistant {number} of {len(learners) - 1}",
        )
        results.append(result)
        share = passes * _epoch_cost(macs[number - 1], macs[number]) / direct
        facts.append({"macs": macs[number], "epochs": passes, "share_of_direct": share})
        if not last:
            facts[-1]["quality"] = context.evaluate(result.model).value
            before = result.model
    context.note(assistants=facts[:-1], student=facts[-1], teacher_macs=macs[0])
    settings = settings.model_copy(update={"epochs": epochs[-1]})
    course = after(results[:-1], result)
    return report(student, result, config, context, settings=settings, course=course)


def share_budget(epochs: int, macs: Sequence[int]) -> list[int]:
    """Return the epochs of each training of a chain that together cost no more than distilling directly.

    All get equally many; what is left then goes to the last one.

    Args:
        epochs: Of distilling the last model directly by the first one.
        macs: Operations of the teacher, the assistants, and the student.

    Returns:
        For each assistant, and for the student; all 0 where the epochs are too few.
    """
    costs = [_epoch_cost(before, after) for before, after in pairwise(macs)]
    budget = epochs * _epoch_cost(macs[0], macs[-1])
    each = budget // sum(costs)
    shares = [each] * len(costs)
    if each:
        shares[-1] += (budget - each * sum(costs)) // costs[-1]
    return shares


def _epoch_cost(teacher: int, learner: int) -> int:
    """Return the operations of training per sample."""
    return teacher + _TRAINING_PASSES * learner


def _between(teacher: Model, student: Model, config: AssistantsConfig, context: Context) -> list[Model]:
    """Return untrained assistants from the largest to the smallest."""
    if config.by is None and not config.assistants:
        return []
    where, largest, smallest = f"stages.{context.name}", teacher.macs(), student.macs()
    if smallest >= largest:
        raise StageError(
            "no assistant lies between a teacher and a student that is no smaller",
            where=where,
            value={"teacher": largest, "student": smallest},
            hint="distil by soft_labels, or name a larger teacher",
        )
    if config.by is None:
        made = [context.source(source) for source in config.assistants]
    else:
        config.check_by(context.settings_of(config.by), name=context.name)
        made = [
            _cut(teacher, (smallest / largest) ** (number / (config.count + 1)), number, config.by, context)
            for number in range(1, config.count + 1)
        ]
    sizes = [largest, *(each.macs() for each in made), smallest]
    if any(after >= before for before, after in pairwise(sizes)):
        raise StageError(
            "the operations of teacher, assistants and student do not fall from one to the next",
            where=f"{where}.{'by' if config.by else 'assistants'}",
            value=sizes,
            hint="lower count, or let the pruning stage cut finer (round_to)"
            if config.by
            else "give assistants from the largest to the smallest, between teacher and student",
        )
    return made


def _cut(teacher: Model, kept: float, number: int, by: str, context: Context) -> Model:
    pruning = context.settings_of(by)
    fields = type(pruning).model_fields
    # The assistant learns from the teacher next, so that the cut needs neither fine-tuning nor a comparison.
    targets = dict.fromkeys(getattr(pruning, "quantities", ()))
    changes = {**targets, "macs": kept, "recover": None, "recover_last": False, "compare_samples": 0}
    settings = {name: value for name, value in changes.items() if name in fields}
    with _without_notes(context):
        return context.run_stage(teacher, stage=by, name=f"assistant{number}", settings=settings)


@contextmanager
def _without_notes(context: Context) -> Iterator[None]:
    """Keep what another stage notes of an assistant out of this stage's report."""
    notes: dict[str, Any] = dict(context.notes)
    yield
    context.notes.clear()
    context.notes.update(notes)
