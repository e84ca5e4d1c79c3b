"""A plain small convolutional net, for the quickstart and for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from mil_cli.errors import ModelError
from mil_cli.models.checks import check_positive


class ConvNet(nn.Module):
    """3x3 convolutions with batch norm and ReLU, some followed by pooling; a hidden layer and a classifier.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        widths: Channels of each convolution.
        pool_after: Positions of the convolutions that 2x2 max pooling follows.
        hidden: Width of the hidden layer; 0 leaves it out.
    """

    def __init__(
        self, *, in_channels: int, num_classes: int, widths: Sequence[int], pool_after: Sequence[int], hidden: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for position, width in enumerate(widths):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if position in pool_after:
                layers.append(nn.MaxPool2d(2))
            channels = width
        self.features = nn.Sequential(*layers)
        head: list[nn.Module] = [nn.Linear(channels, hidden), nn.ReLU()] if hidden else []
        self.head = nn.Sequential(*head, nn.Linear(hidden or channels, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, in_channels, h, w) to class scores (batch, num_classes)."""
        x = functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return self.head(x)  # type: ignore[no-any-return]


def convnet(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    widths: Sequence[int] = (32, 64, 128),
    pool_after: Sequence[int] = (0, 1),
    hidden: int = 128,
) -> ConvNet:
    """Build the plain convolutional net; the default suits 8x8 digits.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        widths: Channels of each convolution.
        pool_after: Positions (from 0) of the convolutions that 2x2 max pooling follows.
        hidden: Width of the hidden layer before the classifier; 0 leaves it out.

    Raises:
        ModelError: A setting is out of range.
    """
    check_positive({"num_classes": num_classes, "in_channels": in_channels})
    check_positive({f"widths[{index}]": value for index, value in enumerate(widths)})
    if not widths:
        raise ModelError("at least one convolution is needed", where="model.widths", value=list(widths))
    if hidden < 0:
        raise ModelError("cannot be negative", where="model.hidden", value=hidden)
    for position in pool_after:
        if not 0 <= position < len(widths):
            raise ModelError(f"there are convolutions 0 to {len(widths) - 1}", where="model.pool_after", value=position)
    return ConvNet(
        in_channels=in_channels, num_classes=num_classes, widths=widths, pool_after=pool_after, hidden=hidden
    )
