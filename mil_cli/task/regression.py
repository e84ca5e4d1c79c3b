"""Regression: numbers per sample; squared, absolute or Huber loss, and RMSE, MSE, MAE or R2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError
from mil_cli.task.entry_task import EntryTask
from mil_cli.task.fields import check_choice

_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": functional.mse_loss,
    "mae": functional.l1_loss,
    "huber": functional.huber_loss,
}
_CONSTANT = 1e-12
"""Share of the mean square below which a variance is what rounding leaves of none."""

_METRICS = {"rmse": "RMSE", "mse": "MSE", "mae": "MAE", "r2": "R2"}


@dataclass(frozen=True, kw_only=True)
class Regression(EntryTask):
    """Real numbers; the model's output has the target's shape (a last axis of length 1 may be missing in one).

    Attributes:
        loss_kind: ``mse``, ``mae`` or ``huber``.
        metric_kind: ``rmse``, ``mse``, ``mae`` (lower is better) or ``r2`` (higher is better).
    """

    name: ClassVar[str] = "regression"

    loss_kind: str = "mse"
    metric_kind: str = "rmse"

    def __post_init__(self) -> None:
        check_choice(self.loss_kind, tuple(_LOSSES), where="task.loss_kind")
        check_choice(self.metric_kind, tuple(_METRICS), where="task.metric_kind")

    @property
    def metric_name(self) -> str:
        """What reports call the metric."""
        return _METRICS[self.metric_kind]

    @property
    def higher_is_better(self) -> bool:
        """R2: yes; errors: no."""
        return self.metric_kind == "r2"

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
            return R2()
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
        student, teacher = self._compared(student_outputs, teacher_outputs)
        return functional.mse_loss(student, teacher)

    def _output_and_target(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        output = self._scored(outputs)
        target = self._target(batch).to(output.dtype)
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


class R2(Metric):
    """R2 over all numbers: 1 - residual sum of squares / total sum of squares about the mean.

    Sums are kept in float64. torchmetrics' own takes sums of squares below 1e-4 for zero, and loses the variance of
    targets far from zero to rounding. Where all targets are equal, R2 is 1 if they are met exactly, else 0, as in
    scikit-learn.
    """

    is_differentiable = False
    higher_is_better = True
    residual: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("residual", "total", "squares", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Count numbers; both of the same shape."""
        output, target = output.double(), target.double()
        self.residual += (output - target).square().sum()
        self.total += target.sum()
        self.squares += target.square().sum()
        self.count += target.numel()

    def compute(self) -> torch.Tensor:
        """Return the R2 of all numbers so far."""
        variation = self.squares - self.total.square() / self.count
        if variation <= _CONSTANT * self.squares:
            return (self.residual == 0).double()
        return 1 - self.residual / variation
