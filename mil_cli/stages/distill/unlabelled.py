"""Distillation on other data: any inputs of the right shape feed teacher and student; labels are not used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from mil_cli.data.fitted import FittedImages
from mil_cli.errors import MilError, StageError
from mil_cli.stages.distill.distil import KeepingConfig, Lesson, Source, StudentConfig, student_of, teach, teacher_of
from mil_cli.stages.registry import stage
from mil_cli.training.evaluate import fixed_batch

if TYPE_CHECKING:
    from mil_cli.data.base import Batch, Split
    from mil_cli.graph.model import Model
    from mil_cli.graph.spec import TensorSpec
    from mil_cli.stages.context import Context
    from mil_cli.task.base import Task
    from mil_cli.training.objective import Objective

_PROBE = 2
_IMAGE_AXES = 4


class UnlabelledConfig(KeepingConfig, StudentConfig):
    """Settings of distillation on other data.

    Attributes:
        data: The data, as in the recipe's section ``data``; its train split is read.
        teacher: None: the uncompressed model; else a source of another one.
        temperature: T, by which the class scores of both are divided; no meaning for tasks without classes.
    """

    method: ClassVar[str] = "unlabelled"

    data: dict[str, Any] | None = None
    teacher: Source | None = None
    temperature: float = Field(4.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _some_data(self) -> UnlabelledConfig:
        if self.data is None:
            raise ValueError("give data: _target_ and its arguments, as in the recipe's own section data")
        return self


@stage(UnlabelledConfig)
def unlabelled(model: Model, config: UnlabelledConfig, context: Context) -> Model:
    """Train the student to answer as the teacher does on data other than the recipe's, whose train split is not read.

    Any inputs on which the teacher's answers differ teach something, the more the nearer they are to the model's own
    (Beyer et al. 2022, "Knowledge Distillation: A Good Teacher Is Patient and Consistent", CVPR, distil on images of
    other kinds too). What is minimised is the task's distance alone. Images of another size, grey for colour, or colour
    for grey are adapted.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, trainer, seed, checkpoints, the teacher and the other data.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: The data do not fit the model's inputs.
        DataError: The data cannot be read.
    """
    student, teacher = student_of(model, config, context), teacher_of(config, context)
    where = f"stages.{context.name}.data"
    train = _fitted(context.other_data(config.data).train, student)
    _check_fit(train, student, context.task, where)
    result = teach(
        student,
        [teacher],
        context,
        lambda lesson: _objective(lesson, config),
        settings=context.trainer(config.trainer),
        cache_gb=config.cache_gb,
        data=context.with_train(train),
    )
    context.note(history=result.history, stopped=result.stopped)
    return result.model


def _objective(lesson: Lesson, config: UnlabelledConfig) -> Objective:
    def distance(outputs: Any, batch: Batch) -> Any:
        return lesson.task.distance(outputs, lesson.teacher(batch), batch, temperature=config.temperature)

    return distance


def _fitted(train: Split, model: Model) -> Split:
    """Return the split with its images brought to the shape of the one image that a model takes, if it does."""
    inputs = model.spec.inputs
    if len(inputs) != 1 or len(inputs[0].shape) != _IMAGE_AXES or not inputs[0].torch_dtype.is_floating_point:
        return train
    _, channels, height, width = inputs[0].shape
    free = {2, 3} & set(inputs[0].dynamic)
    return FittedImages(train, channels=channels, size=None if free else (height, width))


def _check_fit(train: Split, model: Model, task: Task, where: str) -> None:
    """Refuse data whose first batch the model does not take.

    Raises:
        StageError: It does not.
    """
    wanted = [_shown(spec, spec.shape) for spec in model.spec.inputs]
    hint = "choose data with inputs of that form, laid out in batches as the recipe's own are"
    try:
        args, kwargs = task.inputs(next(iter(train.batches(fixed_batch(model) or min(_PROBE, len(train))))))
        tensors = model.flat_inputs(*args, **kwargs)
    except MilError as problem:
        raise StageError(
            f"these data do not fit the model, which takes {wanted}: {problem.what}", where=where, hint=hint
        ) from problem
    for tensor, spec in zip(tensors, model.spec.inputs, strict=True):
        if _shown(spec, tuple(tensor.shape)) != _shown(spec, spec.shape) or tensor.dtype != spec.torch_dtype:
            found = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            raise StageError(
                f"these data do not fit the model, which takes {wanted}", where=where, value=found, hint=hint
            )


def _shown(spec: TensorSpec, shape: tuple[int, ...]) -> str:
    axes = tuple(spec.dynamic.get(axis, size) for axis, size in enumerate(shape))
    return f"{spec.dtype} {axes}"
