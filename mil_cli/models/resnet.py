"""ResNets for small images: `resnet20` and its wider, shallower and strided relatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from mil_cli.models.checks import check_positive, check_stages


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, h, w) to (batch, out_channels, h / stride, w / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages of basic blocks (each but the first halves the resolution), global pooling, a classifier.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        widths: Channels of each stage.
        blocks: Blocks of each stage.
        stem_stride: Stride of the first convolution.
    """

    def __init__(
        self, *, in_channels: int, num_classes: int, widths: Sequence[int], blocks: Sequence[int], stem_stride: int
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, stem_stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        channels = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers = []
            for block in range(count):
                layers.append(BasicBlock(channels, width, 2 if stage > 0 and block == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, in_channels, h, w) to class scores (batch, num_classes)."""
        x = functional.relu(self.bn(self.stem(x)))
        x = self.stages(x)
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def resnet20(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    width: int | None = None,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int | Sequence[int] = 3,
    stem_stride: int = 1,
) -> ResNet:
    """Build the ResNet-20 of He et al. 2016 (arXiv:1512.03385, section 4.2), with 1x1 convolutions as shortcuts.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        width: Channels of the first stage; the next have twice, four times as many. Overrides `widths`.
        widths: Channels of each stage.
        blocks: Blocks of every stage, or of each; 3 makes 20 layers, 1 makes 8.
        stem_stride: Stride of the first convolution; 2 makes the net about four times faster.

    Raises:
        ModelError: A setting is out of range.
    """
    chosen = [width, 2 * width, 4 * width] if width is not None else list(widths)
    counts = [blocks] * len(chosen) if isinstance(blocks, int) else list(blocks)
    check_positive({"num_classes": num_classes, "in_channels": in_channels, "stem_stride": stem_stride})
    check_positive({f"widths[{index}]": value for index, value in enumerate(chosen)})
    check_positive({f"blocks[{index}]": value for index, value in enumerate(counts)})
    check_stages(chosen, counts)
    return ResNet(
        in_channels=in_channels, num_classes=num_classes, widths=chosen, blocks=counts, stem_stride=stem_stride
    )
