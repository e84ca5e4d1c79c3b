"""A designed space of residual nets for grey images of 28x28 that differ in widths and depths alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from mil_cli.models.checks import check_positive, check_stages
from mil_cli.spaces import BatchNorm2d, Conv2d, Linear, Repeat, Width


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


class SlimmableResNet(nn.Module):
    """Stages of a strided convolution and a chosen number of residual blocks; global pooling, a classifier.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        widths: The channels of each stage.
        blocks: For each stage, the most blocks.
    """

    def __init__(self, *, in_channels: int, num_classes: int, widths: Sequence[Width], blocks: Sequence[int]) -> None:
        super().__init__()
        self.widths = list(widths)
        stages: list[nn.Module] = []
        channels: int | Width = in_channels
        for width, count in zip(self.widths, blocks, strict=True):
            strided = Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
            repeat = Repeat([Residual(width) for _ in range(count)], least=1)
            stages.append(nn.Sequential(strided, BatchNorm2d(width), nn.ReLU(), repeat))
            channels = width
        self.stages = nn.ModuleList(stages)
        self.head = Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, in_channels, h, w) to class scores (batch, num_classes)."""
        for stage in self.stages:
            x = stage(x)
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def slimmable_resnet(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    widths: Sequence[Sequence[int]] = ((8, 12, 16), (16, 24, 32), (32, 48, 64)),
    blocks: Sequence[int] = (3, 3, 3),
) -> SlimmableResNet:
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
    check_positive({"num_classes": num_classes, "in_channels": in_channels})
    check_positive({f"blocks[{index}]": value for index, value in enumerate(blocks)})
    stages = [Width(choices) for choices in widths]
    check_stages([width.largest for width in stages], blocks)
    return SlimmableResNet(in_channels=in_channels, num_classes=num_classes, widths=stages, blocks=blocks)
