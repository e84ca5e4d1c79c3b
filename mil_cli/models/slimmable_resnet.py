"""A designed space of residual nets for grey images of 28x28 that differ in widths and depths alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from mil_cli.models.staged import Staged
from mil_cli.spaces import BatchNorm2d, Conv2d, Width


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Args:
        width: Channels of input and output.
    """

    def __init__(self, width: Width) -> None:
        super().__init__()
        self.conv1 = Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, width, h, w) to the same shape."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(x + y)


def slimmable_resnet(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    widths: Sequence[Sequence[int]] = ((8, 12, 16), (16, 24, 32), (32, 48, 64)),
    blocks: Sequence[int] = (3, 3, 3),
) -> Staged:
    """Build a space of residual nets whose widths and depths are chosen, as those of a slimmable net.

    Yu et al. 2019, "Slimmable Neural Networks" (arXiv:1812.08928).

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        widths: For each stage, the channels to choose from.
        blocks: For each stage, the most blocks; one at least runs.

    Raises:
        ModelError: A setting is out of range.
    """
    return Staged(in_channels=in_channels, num_classes=num_classes, widths=widths, blocks=blocks, block=Residual)
