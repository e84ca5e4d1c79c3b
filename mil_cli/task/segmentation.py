"""Segmentation: a class for every pixel; cross-entropy, and mean intersection over union or pixel accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassJaccardIndex

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError
from mil_cli.task.averaging import combine_scored, mean_of_probabilities
from mil_cli.task.divergence import counted_cross_entropy, softened_divergence
from mil_cli.task.fields import (
    Entry,
    InputEntries,
    check_choice,
    entry,
    model_inputs,
    output_tensor,
    target_entry,
    task_fingerprint,
)

_METRICS = ("mean_iou", "pixel_accuracy")


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """One class per pixel; the model gives scores of shape (batch, classes, height, width), the target (batch, h, w).

    Attributes:
        num_classes: Number of classes.
        metric_kind: ``mean_iou`` (over the classes that occur) or ``pixel_accuracy``.
        ignore_index: Label of pixels that do not count.
        label_smoothing: Probability mass spread over all classes in the loss.
        input_keys: See `InputEntries`.
        target_key: The entry with the labels; None: the last of a tuple, or the usual key of a dict.
        output_key: Which output holds the scores; None: the only or first one, or `logits` or `out`.
    """

    num_classes: int
    metric_kind: str = "mean_iou"
    ignore_index: int = 255
    label_smoothing: float = 0.0
    input_keys: InputEntries = None
    target_key: Entry | None = None
    output_key: Entry | None = None

    def __post_init__(self) -> None:
        check_choice(self.metric_kind, _METRICS, where="task.metric_kind")
        if self.num_classes < 2:
            raise TaskError("must be at least 2", where="task.num_classes", value=self.num_classes)
        if not 0 <= self.label_smoothing < 1:
            raise TaskError("must be at least 0 and below 1", where="task.label_smoothing", value=self.label_smoothing)

    @property
    def name(self) -> str:
        """What reports call the task."""
        return "segmentation"

    @property
    def metric_name(self) -> str:
        """What reports call the metric."""
        return "mean IoU" if self.metric_kind == "mean_iou" else "pixel accuracy"

    @property
    def higher_is_better(self) -> bool:
        """Both metrics: yes."""
        return True

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the model's arguments: all entries but the labels, or those chosen."""
        return model_inputs(batch, self.input_keys, without=[target_entry(batch, self.target_key)])

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy over the pixels that count, in nats.

        Raises:
            TaskError: Scores and labels do not fit.
        """
        scores, labels = self._scores_and_labels(outputs, batch)
        try:
            return counted_cross_entropy(
                scores, labels, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing
            )
        except (IndexError, RuntimeError) as problem:
            self._check_range(labels)
            raise TaskError(f"the loss cannot be computed: {problem}", where="task") from problem

    def metric(self) -> Metric:
        """Return a fresh metric."""
        if self.metric_kind == "pixel_accuracy":
            return MeanMetric(nan_strategy="disable")
        return MulticlassJaccardIndex(
            num_classes=self.num_classes, average="macro", ignore_index=self.ignore_index, validate_args=False
        )

    def update(self, metric: Metric, outputs: Any, batch: Batch) -> None:
        """Count one batch.

        Raises:
            TaskError: Scores and labels do not fit.
        """
        scores, labels = self._scores_and_labels(outputs, batch)
        self._check_range(labels)
        predicted = scores.argmax(1)
        if self.metric_kind == "mean_iou":
            metric.update(predicted, labels)
            return
        right = (predicted == labels)[labels != self.ignore_index]
        if right.numel():
            metric.update(right.float())

    def distance(self, student_outputs: Any, teacher_outputs: Any, batch: Batch, *, temperature: float) -> torch.Tensor:
        """Return T^2 KL(teacher || student) of the softened classes, mean over the pixels that count."""
        student = output_tensor(student_outputs, self.output_key)
        teacher = output_tensor(teacher_outputs, self.output_key)
        labels = entry(batch, target_entry(batch, self.target_key), where="task.target_key")
        counts = labels != self.ignore_index
        divergence = softened_divergence(student, teacher, temperature=temperature, axis=1)
        return (divergence * counts).sum() / counts.sum().clamp(min=1)

    def class_scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores (pixels, classes) and labels (pixels,) of the pixels that count.

        Raises:
            TaskError: Scores and labels do not fit.
        """
        scores, labels = self._scores_and_labels(outputs, batch)
        self._check_range(labels)
        counts = labels != self.ignore_index
        return scores.movedim(1, -1)[counts], labels[counts]

    def combine(self, outputs: Sequence[Any], weights: Sequence[float], *, temperature: float) -> Any:
        """Return outputs whose softened class probabilities are the weighted mean of the models'."""

        def mean(each: Sequence[torch.Tensor]) -> torch.Tensor:
            return mean_of_probabilities(each, weights, temperature=temperature, axis=1)

        return combine_scored(outputs, self.output_key, mean)

    def fingerprint(self) -> str:
        """Return the SHA-256 of code and settings."""
        return task_fingerprint(self)

    def _scores_and_labels(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        scores = output_tensor(outputs, self.output_key)
        labels = entry(batch, target_entry(batch, self.target_key), where="task.target_key")
        if labels.is_floating_point():
            raise TaskError(
                "labels must be class indices (integers)",
                where="task.target_key",
                value=str(labels.dtype),
                hint="convert them with .long()",
            )
        if labels.ndim == 4 and labels.shape[1] == 1:
            labels = labels[:, 0]
        fits = scores.ndim == 4 and labels.shape == (scores.shape[0], *scores.shape[2:])
        if not fits or scores.shape[1] != self.num_classes:
            raise TaskError(
                f"scores of shape {tuple(scores.shape)} do not fit labels of shape {tuple(labels.shape)} and"
                f" {self.num_classes} classes",
                where="task",
                hint="the model must give (batch, classes, height, width) for labels (batch, height, width)",
            )
        return scores, labels.long()

    def _check_range(self, labels: torch.Tensor) -> None:
        counted = labels[labels != self.ignore_index]
        if not counted.numel():
            return
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= self.num_classes:
            raise TaskError(
                f"labels run from {low} to {high}, but there are {self.num_classes} classes (0 to"
                f" {self.num_classes - 1})",
                where="task.num_classes",
                hint="set task.num_classes or task.ignore_index, or renumber the labels from 0",
            )
