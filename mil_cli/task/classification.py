"""Classification: cross-entropy and accuracy, for one label per sample or per position (token)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError
from mil_cli.task.averaging import combine_scored, mean_of_probabilities
from mil_cli.task.divergence import counted_cross_entropy, softened_divergence
from mil_cli.task.fields import Entry, InputEntries, entry, model_inputs, output_tensor, target_entry, task_fingerprint


@dataclass(frozen=True, kw_only=True)
class Classification:
    """One class out of several; the model gives scores of shape (batch, ..., classes), the target int64 (batch, ...).

    Attributes:
        label_smoothing: Probability mass spread over all classes in the loss (Szegedy et al. 2016).
        top_k: A sample counts as right if its class is among the best k.
        ignore_index: Label of positions that do not count.
        input_keys: See `InputEntries`.
        target_key: The entry with the labels; None: the last of a tuple, or the usual key of a dict.
        output_key: Which output holds the scores; None: the only or first one, or `logits`.
    """

    label_smoothing: float = 0.0
    top_k: int = 1
    ignore_index: int = -100
    input_keys: InputEntries = None
    target_key: Entry | None = None
    output_key: Entry | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise TaskError("must be at least 0 and below 1", where="task.label_smoothing", value=self.label_smoothing)
        if self.top_k < 1:
            raise TaskError("must be at least 1", where="task.top_k", value=self.top_k)

    @property
    def name(self) -> str:
        """What reports call the task."""
        return "classification"

    @property
    def metric_name(self) -> str:
        """What reports call the metric."""
        return "accuracy" if self.top_k == 1 else f"top-{self.top_k} accuracy"

    @property
    def higher_is_better(self) -> bool:
        """Accuracy: yes."""
        return True

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the model's arguments: all entries but the labels, or those chosen."""
        return model_inputs(batch, self.input_keys, without=[target_entry(batch, self.target_key)])

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy in nats.

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
        """Return T^2 KL(teacher || student) of the softened classes, mean over the samples that count."""
        student = output_tensor(student_outputs, self.output_key)
        teacher = output_tensor(teacher_outputs, self.output_key)
        divergence = softened_divergence(student, teacher, temperature=temperature)
        if divergence.ndim == 1:
            return divergence.mean()
        counts = entry(batch, target_entry(batch, self.target_key), where="task.target_key") != self.ignore_index
        return (divergence * counts).sum() / counts.sum().clamp(min=1)

    def class_scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores (positions, classes) and labels (positions,) of the samples or tokens that count.

        Raises:
            TaskError: Scores and labels do not fit.
        """
        scores, labels = self._scores_and_labels(outputs, batch)
        self._check_range(scores, labels)
        counts = labels != self.ignore_index
        return scores[counts], labels[counts]

    def combine(self, outputs: Sequence[Any], weights: Sequence[float], *, temperature: float) -> Any:
        """Return outputs whose softened class probabilities are the weighted mean of the models'."""

        def mean(each: Sequence[torch.Tensor]) -> torch.Tensor:
            return mean_of_probabilities(each, weights, temperature=temperature)

        return combine_scored(outputs, self.output_key, mean)

    def fingerprint(self) -> str:
        """Return the SHA-256 of code and settings."""
        return task_fingerprint(self)

    def _scores_and_labels(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        scores = output_tensor(outputs, self.output_key)
        labels = entry(batch, target_entry(batch, self.target_key), where="task.target_key")
        if labels.is_floating_point() or labels.is_complex():
            raise TaskError(
                "labels must be class indices (integers)",
                where="task.target_key",
                value=str(labels.dtype),
                hint="convert them with .long(), or use the task regression",
            )
        if labels.ndim == 2 and labels.shape[1] == 1 and scores.ndim == 2:
            labels = labels[:, 0]
        if scores.ndim != labels.ndim + 1 or scores.shape[:-1] != labels.shape:
            raise TaskError(
                f"scores of shape {tuple(scores.shape)} do not fit labels of shape {tuple(labels.shape)}",
                where="task",
                hint="the model must give (batch, classes) for labels (batch,); for pixels use the task segmentation",
            )
        return scores.reshape(-1, scores.shape[-1]), labels.reshape(-1).long()

    def _check_range(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        counted = labels[labels != self.ignore_index]
        if not counted.numel():
            return
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= scores.shape[-1]:
            raise TaskError(
                f"labels run from {low} to {high}, but the model has {scores.shape[-1]} classes (0 to"
                f" {scores.shape[-1] - 1})",
                where="task.target_key",
                hint="set the model's number of classes, or renumber the labels from 0",
            )
