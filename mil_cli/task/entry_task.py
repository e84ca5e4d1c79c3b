"""What the built-in tasks share: inputs, target and scored output are entries of batches and of outputs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError
from mil_cli.models.user_code import source_sha256
from mil_cli.task.averaging import mean_of_probabilities, weighted_mean
from mil_cli.task.divergence import check_same_shape, counted_cross_entropy
from mil_cli.task.fields import (
    Entry,
    InputEntries,
    model_inputs,
    no_class_scores,
    output_tensor,
    replace_output,
    target_entry,
    tensor_entry,
)


@dataclass(frozen=True, kw_only=True)
class EntryTask:
    """A task that finds its tensors by the positions or keys of entries.

    Attributes:
        name: What reports call the task.
        input_keys: See `InputEntries`.
        target_key: The entry with the target; None: the last of a tuple, or the usual key of a dict.
        output_key: Which output is scored; None: the only or first one, or one with a usual key.
    """

    name: ClassVar[str]

    input_keys: InputEntries = None
    target_key: Entry | None = None
    output_key: Entry | None = None

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the model's arguments: all entries but the target, or those chosen."""
        return model_inputs(batch, self.input_keys, without=[target_entry(batch, self.target_key)])

    def class_scores(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Refuse: there are no classes.

        Raises:
            TaskError: Always.
        """
        raise no_class_scores(self.name, "it has no classes")

    def combine(self, outputs: Sequence[Any], weights: Sequence[float], *, temperature: float) -> Any:
        """Return outputs that are the weighted mean of the models'; a temperature has no meaning here."""
        return self._replaced(outputs[0], weighted_mean([self._scored(each) for each in outputs], weights))

    def fingerprint(self) -> str:
        """Return the SHA-256 of code and settings."""
        sources = [source_sha256(owner) for owner in type(self).__mro__[:-1]]
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        text = f"{sources} {type(self).__qualname__} {sorted(settings.items())!r}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _scored(self, outputs: Any) -> Tensor:
        return output_tensor(outputs, self.output_key)

    def _replaced(self, outputs: Any, scored: Tensor) -> Any:
        """Return outputs with another tensor in place of the one that is scored."""
        return replace_output(outputs, self._scored(outputs), scored)

    def _compared(self, student_outputs: Any, teacher_outputs: Any) -> tuple[Tensor, Tensor]:
        """Return what is scored of a student's and a teacher's outputs.

        Raises:
            TaskError: They differ in shape.
        """
        student, teacher = self._scored(student_outputs), self._scored(teacher_outputs)
        check_same_shape(student, teacher)
        return student, teacher

    def _target(self, batch: Batch) -> Tensor:
        return tensor_entry(batch, target_entry(batch, self.target_key), where="task.target_key")


@dataclass(frozen=True, kw_only=True)
class ClassTask(EntryTask):
    """A task whose scores are those of classes.

    Attributes:
        class_axis: Of the scores.
    """

    class_axis: ClassVar[int] = -1

    def combine(self, outputs: Sequence[Any], weights: Sequence[float], *, temperature: float) -> Any:
        """Return outputs whose softened class probabilities are the weighted mean of the models'."""
        scored = [self._scored(each) for each in outputs]
        mean = mean_of_probabilities(scored, weights, temperature=temperature, axis=self.class_axis)
        return self._replaced(outputs[0], mean)


@dataclass(frozen=True, kw_only=True)
class LabelTask(ClassTask):
    """A task with a class to name at each position.

    Attributes:
        label_smoothing: Probability mass spread over all classes in the loss (Szegedy et al. 2016).
        ignore_index: Label of positions that do not count.
    """

    label_smoothing: float = 0.0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise TaskError("must be at least 0 and below 1", where="task.label_smoothing", value=self.label_smoothing)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over the positions that count, in nats.

        Raises:
            TaskError: Scores and labels do not fit.
        """
        scores, labels = self._scores_and_labels(outputs, batch)
        try:
            return counted_cross_entropy(
                scores, labels, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
            )
        except (IndexError, RuntimeError) as problem:
            self._check_range(scores, labels)
            raise TaskError(f"the loss cannot be computed: {problem}", where="task") from problem

    def class_scores(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return scores (positions, classes) and labels (positions,) of the positions that count.

        Raises:
            TaskError: Scores and labels do not fit.
        """
        scores, labels = self._scores_and_labels(outputs, batch)
        self._check_range(scores, labels)
        counts = labels != self.ignore_index
        return scores.movedim(self.class_axis, -1)[counts], labels[counts]

    def _mean_of_counted(self, values: Tensor, batch: Batch) -> Tensor:
        """Return the mean of one value for each position over those that count: all, if a batch labels no positions.

        The batches of other data, which teach by what a teacher says of them, have labels of their own or none.
        """
        labels = super()._target(batch)
        if labels.ndim == values.ndim + 1 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.shape != values.shape:
            return values.mean()
        counts = labels != self.ignore_index
        return (values * counts).sum() / counts.sum().clamp(min=1)

    def _scores_and_labels(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return scores, and a label of int64 for each position of theirs.

        Raises:
            TaskError: They do not fit.
        """
        raise NotImplementedError

    def _target(self, batch: Batch) -> Tensor:
        labels = super()._target(batch)
        if labels.is_floating_point() or labels.is_complex():
            raise TaskError(
                "labels must be class indices (integers)",
                where="task.target_key",
                value=str(labels.dtype),
                hint="convert them with .long(); the task for real numbers is regression",
            )
        return labels

    def _check_range(self, scores: Tensor, labels: Tensor) -> None:
        """Refuse labels that are no class of the scores'.

        Raises:
            TaskError: One is below 0, or not below the number of classes.
        """
        counted, classes = labels[labels != self.ignore_index], scores.shape[self.class_axis]
        if not counted.numel():
            return
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= classes:
            raise TaskError(
                f"labels run from {low} to {high}, but the model has {classes} classes (0 to {classes - 1})",
                where="task.target_key",
                hint="set the number of classes or task.ignore_index, or renumber the labels from 0",
            )
