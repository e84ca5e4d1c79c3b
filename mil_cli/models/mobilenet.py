"""A small MobileNetV2-like net: inverted residuals with depthwise convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from mil_cli.models.checks import check_dropout, check_positive, check_stages


def _conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel by 3x3, narrow by 1x1; a shortcut where the shape allows.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the depthwise convolution.
        expansion: How many times wider the inside is.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        widen = [*_conv_norm(in_channels, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        self.body = nn.Sequential(
            *widen,
            *_conv_norm(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            *_conv_norm(hidden, out_channels, 1),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, h, w) to (batch, out_channels, h / stride, w / stride)."""
        y: torch.Tensor = self.body(x)
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """A stem, stages of inverted residuals (each but the first halves the resolution), a wide 1x1, a classifier.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        widths: Channels of each stage.
        blocks: Blocks of each stage.
        expansion: How many times wider the inside of a block is.
        last: Channels before the classifier.
        stem_stride: Stride of the first convolution.
        dropout: Before the classifier.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        expansion: int,
        last: int,
        stem_stride: int,
        dropout: float,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_conv_norm(in_channels, widths[0], 3, stem_stride), nn.ReLU6()]
        channels = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(InvertedResidual(channels, width, stride, 1 if len(layers) == 3 else expansion))
                channels = width
        self.features = nn.Sequential(*layers, *_conv_norm(channels, last, 1), nn.ReLU6())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, in_channels, h, w) to class scores (batch, num_classes)."""
        x = functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return self.head(self.dropout(x))  # type: ignore[no-any-return]


def mobilenet(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    widths: Sequence[int] = (16, 24, 32, 64),
    blocks: Sequence[int] = (1, 2, 3, 2),
    expansion: int = 6,
    last: int = 256,
    stem_stride: int = 1,
    dropout: float = 0.1,
) -> MobileNet:
    """Build a net after MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381), sized for small images.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        widths: Channels of each stage.
        blocks: Blocks of each stage.
        expansion: How many times wider the inside of a block is; the first block is not widened.
        last: Channels before the classifier.
        stem_stride: Stride of the first convolution.
        dropout: Before the classifier.

    Raises:
        ModelError: A setting is out of range.
    """
    check_positive(
        {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "expansion": expansion,
            "last": last,
            "stem_stride": stem_stride,
        }
    )
    check_positive({f"widths[{index}]": value for index, value in enumerate(widths)})
    check_positive({f"blocks[{index}]": value for index, value in enumerate(blocks)})
    check_stages(widths, blocks)
    check_dropout(dropout)
    return MobileNet(
        in_channels=in_channels,
        num_classes=num_classes,
        widths=widths,
        blocks=blocks,
        expansion=expansion,
        last=last,
        stem_stride=stem_stride,
        dropout=dropout,
    )
