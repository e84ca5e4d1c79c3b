"""Regression: numbers per sample; squared, absolute or Huber loss, and RMSE, MSE, MAE or R2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, R2Score

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError
from mil_cli.task.averaging import combine_scored, weighted_mean
from mil_cli.task.divergence import check_same_shape
from mil_cli.task.fields import (
    Entry,
    InputEntries,
    check_choice,
    entry,
    model_inputs,
    no_class_scores,
    output_tensor,
    target_entry,
    task_fingerprint,
)

_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": functional.mse_loss,
    "mae": functional.l1_loss,
    "huber": functional.huber_loss,
}
_METRICS = {"rmse": "RMSE", "mse": "MSE", "mae": "MAE", "r2": "R2"}


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Real numbers; the model's output has the target's shape (a last axis of length 1 may be missing in one).

    Attributes:
        loss_kind: ``mse``, ``mae`` or ``huber``.
        metric_kind: ``rmse``, ``mse``, ``mae`` (lower is better) or ``r2`` (higher is better).
        input_keys: See `InputEntries`.
        target_key: The entry with the target; None: the last of a tuple, or the usual key of a dict.
        output_key: Which output is scored; None: the only or first one.
    """

    loss_kind: str = "mse"
    metric_kind: str = "rmse"
    input_keys: InputEntries = None
    target_key: Entry | None = None
    output_key: Entry | None = None

    def __post_init__(self) -> None:
        check_choice(self.loss_kind, tuple(_LOSSES), where="task.loss_kind")
        check_choice(self.metric_kind, tuple(_METRICS), where="task.metric_kind")

    @property
    def name(self) -> str:
        """What reports call the task."""
        return "regression"

    @property
    def metric_name(self) -> str:
        """What reports call the metric."""
        return _METRICS[self.metric_kind]

    @property
    def higher_is_better(self) -> bool:
        """R2: yes; errors: no."""
        return self.metric_kind == "r2"

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the model's arguments: all entries but the target, or those chosen."""
        return model_inputs(batch, self.input_keys, without=[target_entry(batch, self.target_key)])

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Return the mean loss over all numbers.

        Raises:
            TaskError: Output and target do not fit.
        """
        return _LOSSES[self.loss_kind](*self._output_and_target(outputs, batch))

    def metric(self) -> Metric:
        """Return a fresh metric."""
        if self.metric_kind == "mae":
            return MeanAbsoluteError()
        if self.metric_kind == "r2":
            return R2Score()
        return MeanSquaredError(squared=self.metric_kind == "mse")

    def update(self, metric: Metric, outputs: Any, batch: Batch) -> None:
        """Count one batch.

        Raises:
            TaskError: Output and target do not fit.
        """
        output, target = self._output_and_target(outputs, batch)
        metric.update(output.reshape(-1), target.reshape(-1))

    def distance(self, student_outputs: Any, teacher_outputs: Any, batch: Batch, *, temperature: float) -> torch.Tensor:
        """Return the mean squared difference of the outputs; a temperature has no meaning here."""
        student = output_tensor(student_outputs, self.output_key)
        teacher = output_tensor(teacher_outputs, self.output_key)
        check_same_shape(student, teacher)
        return functional.mse_loss(student, teacher)

    def class_scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: there are no classes.

        Raises:
            TaskError: Always.
        """
        raise no_class_scores(self.name, "it has no classes")

    def combine(self, outputs: Sequence[Any], weights: Sequence[float], *, temperature: float) -> Any:
        """Return outputs that are the weighted mean of the models'; a temperature has no meaning here."""
        return combine_scored(outputs, self.output_key, lambda each: weighted_mean(each, weights))

    def fingerprint(self) -> str:
        """Return the SHA-256 of code and settings."""
        return task_fingerprint(self)

    def _output_and_target(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        output = output_tensor(outputs, self.output_key)
        target = entry(batch, target_entry(batch, self.target_key), where="task.target_key").to(output.dtype)
        if output.ndim == target.ndim + 1 and output.shape[-1] == 1:
            output = output.squeeze(-1)
        elif target.ndim == output.ndim + 1 and target.shape[-1] == 1:
            target = target.squeeze(-1)
        if output.shape != target.shape:
            raise TaskError(
                f"an output of shape {tuple(output.shape)} does not fit a target of shape {tuple(target.shape)}",
                where="task",
                hint="the model must give one number for each number of the target",
            )
        return output, target
