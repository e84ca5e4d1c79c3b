"""A designed space of small nets for grey images of 28x28: poor and good ones, of 0.04 to 3 million operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mil_cli.models.staged import Staged
from mil_cli.spaces import BatchNorm2d, Choice, Conv2d, Kernel, Width
from mil_cli.spaces.sizes import Size

_EXPANSIONS = (1, 2)
_KERNELS = (3, 5)


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel, narrow by 1x1, and add the input; expansion and kernel are chosen.

    Args:
        width: Channels of input and output.
    """

    def __init__(self, width: Width) -> None:
        super().__init__()
        self.expansion, self.kernel = Width(_EXPANSIONS), Kernel(_KERNELS)
        hidden, kernel = width * self.expansion, self.kernel
        self.body = nn.Sequential(
            *_conv_norm(width, hidden, 1),
            nn.ReLU(),
            Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False),
            BatchNorm2d(hidden),
            nn.ReLU(),
            *_conv_norm(hidden, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, width, h, w) to the same shape."""
        return x + self.body(x)  # type: ignore[no-any-return]


def _conv_norm(in_channels: int | Size, out_channels: Size, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False), BatchNorm2d(out_channels)]


class Separable(nn.Module):
    """Filter each channel, mix them by 1x1, rectify; the kernel is chosen.

    Args:
        width: Channels of input and output.
    """

    def __init__(self, width: Width) -> None:
        super().__init__()
        self.kernel = kernel = Kernel(_KERNELS)
        self.depthwise = Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.pointwise = nn.Sequential(*_conv_norm(width, width, 1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, width, h, w) to the same shape."""
        return self.pointwise(self.depthwise(x))  # type: ignore[no-any-return]


def _block(width: Width) -> Choice:
    return Choice(
        {
            "conv": nn.Sequential(*_conv_norm(width, width, 3), nn.ReLU()),
            "separable": Separable(width),
            "inverted": InvertedResidual(width),
            "skip": nn.Identity(),
        }
    )


def small_nets(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    widths: Sequence[Sequence[int]] = ((4, 8, 16), (8, 16, 24), (16, 32, 48)),
    blocks: Sequence[int] = (2, 3, 3),
) -> Staged:
    """Build a space of small nets.

    Each stage has one width, a strided 3x3 convolution and up to `blocks` blocks, each of which is a 3x3 convolution, a
    depthwise separable one, an inverted residual or nothing. Convolutions have no shortcut, so that deep nets of them
    are there too, and narrow ones.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        widths: For each stage, the channels to choose from.
        blocks: For each stage, the most blocks that follow its convolution; one at least does, if only in name.

    Raises:
        ModelError: A setting is out of range.
    """
    return Staged(in_channels=in_channels, num_classes=num_classes, widths=widths, blocks=blocks, block=_block)
