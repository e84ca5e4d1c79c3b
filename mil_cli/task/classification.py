"""Classification: cross-entropy and accuracy, for one label per sample or per position (token)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError
from mil_cli.task.divergence import softened_divergence
from mil_cli.task.entry_task import LabelTask


@dataclass(frozen=True, kw_only=True)
class Classification(LabelTask):
    """One class out of several; the model gives scores of shape (batch, ..., classes), the target int64 (batch, ...).

    Attributes:
        top_k: A sample counts as right if its class is among the best k.
    """

    name: ClassVar[str] = "classification"

    top_k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.top_k, int) or self.top_k < 1:
            raise TaskError("must be a whole number of at least 1", where="task.top_k", value=self.top_k)

    @property
    def metric_name(self) -> str:
        """What reports call the metric."""
        return "accuracy" if self.top_k == 1 else f"top-{self.top_k} accuracy"

    @property
    def higher_is_better(self) -> bool:
        """Accuracy: yes."""
        return True

    def metric(self) -> Metric:
        """Return a fresh accuracy: the mean over samples of right (1) or wrong (0)."""
        return MeanMetric(nan_strategy="disable")

    def update(self, metric: Metric, outputs: Any, batch: Batch) -> None:
        """Count one batch.

        Raises:
            TaskError: Scores and labels do not fit.
        """
        scores, labels = self._scores_and_labels(outputs, batch)
        self._check_range(scores, labels)
        counts = labels != self.ignore_index
        best = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1).indices
        right = (best == labels.unsqueeze(-1)).any(-1)[counts]
        if right.numel():
            metric.update(right.float())

    def distance(self, student_outputs: Any, teacher_outputs: Any, batch: Batch, *, temperature: float) -> torch.Tensor:
        """Return T^2 KL(teacher || student) of the softened classes, mean over the samples or positions.

        Positions whose label does not count are left out; all count where a batch has no label for each, as other data
        may not.
        """
        student, teacher = self._scored(student_outputs), self._scored(teacher_outputs)
        divergence = softened_divergence(student, teacher, temperature=temperature)
        if divergence.ndim == 1:
            return divergence.mean()
        return self._mean_of_counted(divergence, batch)

    def _scores_and_labels(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        scores, labels = self._scored(outputs), self._target(batch)
        if labels.ndim == 2 and labels.shape[1] == 1 and scores.ndim == 2:
            labels = labels[:, 0]
        if scores.ndim != labels.ndim + 1 or scores.shape[:-1] != labels.shape:
            raise TaskError(
                f"scores of shape {tuple(scores.shape)} do not fit labels of shape {tuple(labels.shape)}",
                where="task",
                hint="the model must give (batch, classes) for labels (batch,); for pixels use the task segmentation",
            )
        return scores.reshape(-1, scores.shape[-1]), labels.reshape(-1).long()
