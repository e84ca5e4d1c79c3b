"""Designed spaces of nets in stages: a strided convolution, then a chosen number of blocks, and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from mil_cli.models.checks import check_positive, check_stages
from mil_cli.spaces import BatchNorm2d, Conv2d, Linear, Repeat, Width


class Staged(nn.Module):
    """Stages of a strided 3x3 convolution and a chosen number of blocks; global pooling, a classifier.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        widths: For each stage, the channels to choose from.
        blocks: For each stage, the most blocks; one at least runs.
        block: Makes a block that maps (batch, width, h, w) to the same shape.

    Attributes:
        widths: The width of each stage.

    Raises:
        ModelError: A setting is out of range.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: Sequence[Sequence[int]],
        blocks: Sequence[int],
        block: Callable[[Width], nn.Module],
    ) -> None:
        super().__init__()
        check_positive({"num_classes": num_classes, "in_channels": in_channels})
        check_positive({f"blocks[{index}]": value for index, value in enumerate(blocks)})
        self.widths = [Width(choices) for choices in widths]
        check_stages([width.largest for width in self.widths], blocks)
        stages: list[nn.Module] = []
        channels: int | Width = in_channels
        for width, count in zip(self.widths, blocks, strict=True):
            strided = Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
            repeat = Repeat([block(width) for _ in range(count)], least=1)
            stages.append(nn.Sequential(strided, BatchNorm2d(width), nn.ReLU(), repeat))
            channels = width
        self.stages = nn.ModuleList(stages)
        self.head = Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, in_channels, h, w) to class scores (batch, num_classes)."""
        for stage in self.stages:
            x = stage(x)
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]
