"""Image to image (super-resolution, denoising, restoration): L1, Charbonnier or squared loss, and PSNR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional.image import peak_signal_noise_ratio

from mil_cli.data.base import Batch
from mil_cli.errors import TaskError
from mil_cli.task.entry_task import EntryTask
from mil_cli.task.fields import check_choice

_LOSSES = ("l1", "charbonnier", "mse")

HIGHEST_PSNR = 100.0
"""In dB; what an image counts at most. One that is met exactly has an infinite PSNR, and the mean would be too."""


@dataclass(frozen=True, kw_only=True)
class ImageToImage(EntryTask):
    """An image for an image: output and target of shape (batch, channels, height, width).

    Attributes:
        loss_kind: ``l1``, ``charbonnier`` (sqrt of squared difference + epsilon^2; Lai et al. 2017, LapSRN) or ``mse``.
        data_range: Largest value minus smallest that an image can have (1.0 for images in [0, 1]).
        minimum: Smallest value that an image can have; outputs are cut to the range before they are scored.
        border: Pixels at each edge that are not scored, as is usual in super-resolution.
        epsilon: Of the Charbonnier loss.
    """

    name: ClassVar[str] = "image_to_image"

    loss_kind: str = "l1"
    data_range: float = 1.0
    minimum: float = 0.0
    border: int = 0
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        check_choice(self.loss_kind, _LOSSES, where="task.loss_kind")
        if self.data_range <= 0:
            raise TaskError("must be above 0", where="task.data_range", value=self.data_range)
        if self.epsilon <= 0:  # the root of 0 has no slope: its gradient is NaN
            raise TaskError("must be above 0", where="task.epsilon", value=self.epsilon)
        if self.border < 0:
            raise TaskError("cannot be negative", where="task.border", value=self.border)

    @property
    def metric_name(self) -> str:
        """What reports call the metric: the mean over images of each image's PSNR, in dB, 100 at most."""
        return "PSNR"

    @property
    def higher_is_better(self) -> bool:
        """PSNR: yes."""
        return True

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Return the mean loss over all pixels.

        Raises:
            TaskError: Output and target differ in shape.
        """
        output, target = self._output_and_target(outputs, batch)
        if self.loss_kind == "l1":
            return functional.l1_loss(output, target)
        if self.loss_kind == "mse":
            return functional.mse_loss(output, target)
        return torch.sqrt((output - target) ** 2 + self.epsilon**2).mean()

    def metric(self) -> Metric:
        """Return a fresh PSNR, averaged over images."""
        return MeanMetric(nan_strategy="disable")

    def update(self, metric: Metric, outputs: Any, batch: Batch) -> None:
        """Count one batch.

        Raises:
            TaskError: Output and target differ in shape, or the border leaves nothing.
        """
        output, target = self._output_and_target(outputs, batch)
        output = output.clamp(self.minimum, self.minimum + self.data_range)
        if self.border:
            inner = slice(self.border, -self.border)
            output, target = output[..., inner, inner], target[..., inner, inner]
            if not output.numel():
                raise TaskError("the border leaves no pixel", where="task.border", value=self.border)
        each = peak_signal_noise_ratio(output, target, self.data_range, dim=(1, 2, 3), reduction="none")
        metric.update(each.clamp(max=HIGHEST_PSNR))

    def distance(self, student_outputs: Any, teacher_outputs: Any, batch: Batch, *, temperature: float) -> torch.Tensor:
        """Return the mean absolute difference of the images; a temperature has no meaning here."""
        student, teacher = self._compared(student_outputs, teacher_outputs)
        return functional.l1_loss(student, teacher)

    def _output_and_target(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        output = self._scored(outputs)
        target = self._target(batch).to(output.dtype)
        if output.ndim != 4 or output.shape != target.shape:
            raise TaskError(
                f"an output of shape {tuple(output.shape)} does not fit a target of shape {tuple(target.shape)}",
                where="task",
                hint="both must be (batch, channels, height, width)",
            )
        return output, target
