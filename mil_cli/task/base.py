"""What a model is for: its inputs from a batch, its loss, its metric, and how far two models' outputs are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torchmetrics import Metric

from mil_cli.data.base import Batch


@runtime_checkable
class Task(Protocol):
    """A task; the same one scores a torch graph and an exported file."""

    @property
    def name(self) -> str:
        """What reports call the task."""
        ...

    @property
    def metric_name(self) -> str:
        """What reports call the metric."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value of the metric is better."""
        ...

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the model's positional and keyword arguments out of a batch."""
        ...

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Return the training loss, a scalar: the mean over the batch."""
        ...

    def metric(self) -> Metric:
        """Return a fresh metric; its `compute` gives a scalar."""
        ...

    def update(self, metric: Metric, outputs: Any, batch: Batch) -> None:
        """Count one batch into a metric."""
        ...

    def distance(self, student_outputs: Any, teacher_outputs: Any, batch: Batch, *, temperature: float) -> torch.Tensor:
        """Return what distillation minimises between two models' outputs on one batch, a scalar.

        It is scaled so that it can be mixed with the loss as it is: where a temperature softens, its square is
        already multiplied in.
        """
        ...

    def class_scores(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the class scores and labels of all positions that count: (positions, classes) and int64 (positions,).

        Two models' scores for one batch belong together row by row.

        Raises:
            TaskError: The task has no classes, or no label for each position.
        """
        ...

    def combine(self, outputs: Sequence[Any], weights: Sequence[float], *, temperature: float) -> Any:
        """Return the weighted mean of several models' outputs on one batch, in a form that `distance` takes.

        Args:
            outputs: Those of each model.
            weights: One for each, at least 0, of sum 1.
            temperature: Where there are classes, that at which their probabilities are averaged.
        """
        ...

    def fingerprint(self) -> str:
        """Return the SHA-256 of the task's code and settings."""
        ...
