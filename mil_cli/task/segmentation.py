"""Segmentation: a class for every pixel; cross-entropy, and mean intersection over union or pixel accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassJaccardIndex

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError
from mil_cli.task.divergence import softened_divergence
from mil_cli.task.entry_task import LabelTask
from mil_cli.task.fields import check_choice

_METRICS = ("mean_iou", "pixel_accuracy")


@dataclass(frozen=True, kw_only=True)
class Segmentation(LabelTask):
    """One class per pixel; the model gives scores of shape (batch, classes, height, width), the target (batch, h, w).

    Attributes:
        num_classes: Number of classes.
        metric_kind: ``mean_iou`` (over the classes that occur) or ``pixel_accuracy``.
    """

    name: ClassVar[str] = "segmentation"
    class_axis: ClassVar[int] = 1

    num_classes: int
    metric_kind: str = "mean_iou"
    ignore_index: int = 255

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.metric_kind, _METRICS, where="task.metric_kind")
        if self.num_classes < 2:
            raise TaskError("must be at least 2", where="task.num_classes", value=self.num_classes)

    @property
    def metric_name(self) -> str:
        """What reports call the metric."""
        return "mean IoU" if self.metric_kind == "mean_iou" else "pixel accuracy"

    @property
    def higher_is_better(self) -> bool:
        """Both metrics: yes."""
        return True

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
        self._check_range(scores, labels)
        predicted = scores.argmax(1)
        if self.metric_kind == "mean_iou":
            metric.update(predicted, labels)
            return
        right = (predicted == labels)[labels != self.ignore_index]
        if right.numel():
            metric.update(right.float())

    def distance(self, student_outputs: Any, teacher_outputs: Any, batch: Batch, *, temperature: float) -> torch.Tensor:
        """Return T^2 KL(teacher || student) of the softened classes, mean over the pixels that count.

        Where a batch has no label for each pixel, as other data may not, all count.
        """
        student, teacher = self._scored(student_outputs), self._scored(teacher_outputs)
        divergence = softened_divergence(student, teacher, temperature=temperature, axis=self.class_axis)
        return self._mean_of_counted(divergence, batch)

    def _scores_and_labels(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        scores, labels = self._scored(outputs), self._target(batch)
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
