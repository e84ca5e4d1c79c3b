"""Learning from coarse to fine: every level of the pyramid has a loss of its own, and the finest image is scored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mil_cli.task.image_to_image import ImageToImage


class Pyramid:
    """L1 loss at each level, PSNR of the image of full size.

    Ignatov et al. train the levels one after the other, the coarsest first. Here all of them learn at once, so that one
    training is enough, and so that the coarser levels stay what they are while a pruned net is distilled.

    Args:
        coarse_weight: Weight of each coarser level's loss beside that of the finest.
    """

    metric_name = "PSNR"
    higher_is_better = True

    def __init__(self, coarse_weight: float = 0.25) -> None:
        self._coarse_weight = coarse_weight
        self._finest = ImageToImage(loss_kind="l1", output_key="image")

    def loss(self, outputs: dict[str, Tensor], batch: Any) -> Tensor:
        """Return the weighted sum of the mean absolute differences from the photograph, shrunk to each level's size."""
        _, photograph = batch
        return self._sum(outputs, {name: _shrunk(photograph, image) for name, image in outputs.items()})

    def distance(
        self, outputs: dict[str, Tensor], teacher: dict[str, Tensor], batch: Any, *, temperature: float
    ) -> Tensor:
        """Return the same sum of the differences from another model's images; a temperature has no meaning here."""
        return self._sum(outputs, teacher)

    def metric(self) -> Any:
        """Return a fresh PSNR."""
        return self._finest.metric()

    def update(self, metric: Any, outputs: Any, batch: Any) -> None:
        """Count one batch."""
        self._finest.update(metric, outputs, batch)

    def _sum(self, images: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        losses = [
            (1.0 if name == "image" else self._coarse_weight) * functional.l1_loss(image, targets[name])
            for name, image in images.items()
        ]
        return torch.stack(losses).sum()


def _shrunk(photograph: Tensor, image: Tensor) -> Tensor:
    return functional.avg_pool2d(photograph, photograph.shape[-1] // image.shape[-1])
