"""Distillation without data: a generator makes what looks like training data to the teacher, and a student learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils import _pytree as pytree

from mil_cli.data.augment import Augment
from mil_cli.errors import StageError, TaskError
from mil_cli.stages.distill.distil import Source, StudentConfig, student_of, teacher_of
from mil_cli.stages.distill.generator import MOST_AXES, Bank, Generator
from mil_cli.stages.distill.synthesis import MadeSplit, Synthesis
from mil_cli.stages.distill.teacher import Teacher
from mil_cli.stages.registry import stage
from mil_cli.stages.surroundings import fingerprint_of
from mil_cli.task.classification import Classification
from mil_cli.task.fields import TARGET_KEYS, output_tensor
from mil_cli.training.batch_norm import norms_with_statistics
from mil_cli.training.evaluate import fixed_batch

if TYPE_CHECKING:
    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.task.base import Task
    from mil_cli.training.objective import Objective, Running

_IMAGE_AXES = 4
_UNLABELLED = "distill by the method unlabelled, on any inputs of the right shape"


class DataFreeConfig(StudentConfig):
    """Settings of distillation without data.

    Attributes:
        teacher: None: the uncompressed model; else a source of another one.
        temperature: T, by which the class scores of student and teacher are divided.
        range: (low, high) of the values that the model's inputs have; None: each channel has mean 0 and variance 1.
        samples: Inputs that an epoch gives to the student.
        every: The student's steps for each batch that is made; the other batches are drawn from the bank.
        generators: How many make batches in turn; each finds inputs of its own.
        generator_steps: The steps of one generator for each batch that is made.
        warmup: The steps of each before the first one.
        bank: How many inputs are kept.
        noise: Numbers of noise that an input is made of.
        width: Channels of the generator's last hidden layer.
        generator_learning_rate: Of the generator (Adam).
        statistics_weight: Of the distance between a batch's statistics and those that the teacher's batch norms hold.
        first_norm_weight: Factor on the first batch norm in it, which sees the inputs almost as they are.
        class_weight: Of the teacher's cross-entropy to the classes that the generator was asked for.
        adversarial_weight: Of the student's agreement with the teacher, which the generator avoids.
        variation_weight: Of the inputs' total variation.
        magnitude_weight: Of the inputs' mean square.
        generator_only: For a teacher without batch norms: certain classes, excited features and an even share of all
            classes in place of statistics.
        activation_weight: Of the features' activation, with `generator_only`.
        balance_weight: Of the entropy of the classes, with `generator_only`.
        crop_padding: Random shift of the images that the student sees, in pixels; no meaning for other inputs.
        flip: Whether they are mirrored at random.
    """

    method: ClassVar[str] = "data_free"

    teacher: Source | None = None
    temperature: float = Field(4.0, gt=0, allow_inf_nan=False)
    range: tuple[float, float] | None = None
    samples: int = Field(20_000, ge=1)
    every: int = Field(4, ge=1)
    generators: int = Field(1, ge=1)
    generator_steps: int = Field(2, ge=1)
    warmup: int = Field(150, ge=0)
    bank: int = Field(8192, ge=1)
    noise: int = Field(100, ge=1)
    width: int = Field(16, ge=1)
    generator_learning_rate: float = Field(5e-3, gt=0, allow_inf_nan=False)
    statistics_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    first_norm_weight: float = Field(10.0, ge=0, allow_inf_nan=False)
    class_weight: float = Field(3.0, ge=0, allow_inf_nan=False)
    adversarial_weight: float = Field(5.0, ge=0, allow_inf_nan=False)
    variation_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    magnitude_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    generator_only: bool = False
    activation_weight: float = Field(0.1, ge=0, allow_inf_nan=False)
    balance_weight: float = Field(5.0, ge=0, allow_inf_nan=False)
    crop_padding: int = Field(2, ge=0)
    flip: bool = True

    @model_validator(mode="after")
    def _low_below_high(self) -> DataFreeConfig:
        if self.range is not None and not -math.inf < self.range[0] < self.range[1] < math.inf:
            raise ValueError("range is [low, high] with low below high, both finite")
        return self


@stage(DataFreeConfig)
def data_free(model: Model, config: DataFreeConfig, context: Context) -> Model:
    """Train the student on inputs made from the teacher alone, while they are made.

    A generator (from noise and a class) is trained so that the teacher sees the class asked for and, in its batch
    norms, the statistics of its own training data (Yin et al. 2020, "Dreaming to Distill: Data-free Knowledge Transfer
    via DeepInversion", CVPR), and so that the student does not answer as the teacher does yet. What it makes is kept in
    a bounded bank, on which the student takes several steps for each batch that is made (Fang et al. 2022, "Up to 100x
    Faster Data-Free Knowledge Distillation", AAAI; there the generator is fitted to each batch from a common start).
    With `generator_only` the statistics are replaced by the losses of Chen et al. 2019, "Data-Free Learning of Student
    Networks" (ICCV). The student's own batch norms keep the statistics of what it was trained on.

    The recipe's train split is never read. Val is read for the report alone and decides nothing, unless the training
    diverges: then it tells the last good weights.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, trainer, seed, checkpoints and the teacher.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: Inputs of this model, or for this task, cannot be made; the teacher has no batch norms.
    """
    student, teacher = student_of(model, config, context), teacher_of(config, context)
    where = f"stages.{context.name}"
    shape = _input_shape(student, where)
    form = _batch_form(student, context.task, where)
    scores = _class_scores(context.task, where)
    if not config.generator_only and not norms_with_statistics(teacher):
        raise StageError(
            "the teacher has no batch norms, whose statistics tell what its training data were like",
            where=f"{where}.teacher",
            value=config.teacher,
            hint=f"set {where}.generator_only: true, or {_UNLABELLED}",
        )
    with torch.no_grad():
        args, kwargs = _call(teacher, torch.zeros(student.spec.inputs[0].shape))
        classes = scores(teacher(*args, **kwargs)).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        told = 0 if config.generator_only else classes
        generators = [
            Generator(shape, classes=told, noise=config.noise, width=config.width, span=config.range)
            for _ in range(config.generators)
        ]
    synthesis = Synthesis(
        config,
        generators,
        Bank(shape, capacity=config.bank),
        teacher=teacher,
        scores=scores,
        call=lambda inputs: _call(student, inputs),
        seed=context.seed,
    )
    split = MadeSplit(
        synthesis,
        samples=config.samples,
        every=config.every,
        augment=_augment(config, shape),
        form=form,
        fingerprint=fingerprint_of([config.model_dump(mode="json"), context.seed, teacher.fingerprint()]),
    )

    data = context.with_train(split, made=True)
    settings = context.trainer({**config.trainer, "early_stopping": None})

    def bind(running: Running) -> Objective:
        synthesis.begin(running)
        each = -(-config.warmup * len(data.train) // len(split))  # a dry run takes as little of it as of an epoch
        with context.progress.work(f"{context.name}: training the generators", config.generators * each) as bar:
            synthesis.warm_up(each, fixed_batch(student) or settings.batch_size, context.slot("generators"), bar)
        answering = Teacher(teacher, context.task, running)
        return lambda outputs, batch: context.task.distance(
            outputs, answering(batch), batch, temperature=config.temperature
        )

    result = context.train(
        student,
        settings=settings,
        doing="distilling without data",
        bind=bind,
        companions=synthesis,
        data=data,
    )
    context.note(history=result.history, stopped=result.stopped, inputs_made=int(synthesis.bank.made))
    return result.model


def _input_shape(model: Model, where: str) -> tuple[int, ...]:
    """Return the shape of one input of a model that takes one tensor of numbers, the samples along its first axis.

    Raises:
        StageError: It takes something else.
    """
    inputs = model.spec.inputs
    takes = [f"{tensor.dtype} {tensor.shape}" for tensor in inputs]
    if len(inputs) != 1 or not inputs[0].torch_dtype.is_floating_point:
        problem = "inputs can be made only of a model that takes one tensor of floating-point numbers"
    elif not 1 <= len(inputs[0].shape) - 1 <= 1 + MOST_AXES or inputs[0].batch_axis() not in (0, None):
        problem = f"inputs can be made only of shape (batch, channels, ...) with up to {MOST_AXES} more axes"
    else:
        return inputs[0].shape[1:]
    raise StageError(problem, where=f"{where}.method", value=takes, hint=_UNLABELLED)


def _call(model: Model, inputs: Tensor) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the (args, kwargs) by which a model of one input takes it."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda _: inputs, model.samples)
    return args, kwargs


def _batch_form(model: Model, task: Task, where: str) -> Callable[[Tensor], Batch]:
    """Return what makes inputs a batch out of which the task takes them; its labels have no meaning.

    Raises:
        StageError: The task takes its inputs out of something else than inputs and labels.
    """
    keys = getattr(task, "input_keys", None)
    names = list(keys.values()) if isinstance(keys, Mapping) else list(keys or [])
    name = names[0] if names else model.spec.inputs[0].name
    target = getattr(task, "target_key", None)

    def as_tuple(inputs: Tensor) -> Batch:
        return inputs, torch.zeros(len(inputs), dtype=torch.int64)

    def as_mapping(inputs: Tensor) -> Batch:
        key = TARGET_KEYS[0] if target is None else str(target)
        return {str(name): inputs, key: torch.zeros(len(inputs), dtype=torch.int64)}

    probe = torch.zeros(model.spec.inputs[0].shape)
    for form in (as_tuple, as_mapping):
        try:
            taken = task.inputs(form(probe))
        except (TaskError, LookupError, TypeError):
            continue
        leaves, tree = pytree.tree_flatten(taken)
        if len(leaves) == 1 and leaves[0] is probe and tree == pytree.tree_structure(_call(model, probe)):
            return form
    raise StageError(
        "the task takes the model's input out of a batch of a form of its own, which cannot be made",
        where=f"{where}.method",
        value=task.name,
        hint=_UNLABELLED,
    )


def _class_scores(task: Task, where: str) -> Callable[[Any], Tensor]:
    """Return what takes scores of shape (batch, classes) out of a model's outputs.

    Raises:
        StageError: The task has none.
    """
    if not isinstance(task, Classification):
        raise StageError(
            "inputs can be made only for a task with one class per sample",
            where=f"{where}.method",
            value=task.name,
            hint=_UNLABELLED,
        )

    def scores(outputs: Any) -> Tensor:
        found = output_tensor(outputs, task.output_key)
        if found.ndim != 2:
            raise StageError(
                f"the model gives scores of shape {tuple(found.shape)}, not one class per sample",
                where=f"{where}.method",
                hint=_UNLABELLED,
            )
        return found

    return scores


def _augment(config: DataFreeConfig, shape: Sequence[int]) -> Augment | None:
    if len(shape) + 1 != _IMAGE_AXES:
        return None
    fill = 0.0 if config.range is None else config.range[0]
    return Augment(crop_padding=config.crop_padding, flip=config.flip, fill=fill)
