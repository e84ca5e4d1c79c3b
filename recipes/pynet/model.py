"""A small PyNet (Ignatov et al. 2020, arXiv:2002.05509): an inverted pyramid from a sensor's mosaic to a photograph."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = "half", "quarter", "eighth", "sixteenth"  # names of the coarser images, by level


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution and a rectifier."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.LeakyReLU(0.2))


class MultiKernel(nn.Module):
    """A 3x3 and a 5x5 convolution side by side; the latter costs more, and makes a quarter of the channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = outputs // 4
        self.parts = nn.ModuleList([conv(inputs, outputs - wide, 3), conv(inputs, wide, 5)])

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same resolution."""
        return torch.cat([part(x) for part in self.parts], dim=1)


class Level(nn.Module):
    """One level of the pyramid: joins what the coarser level found with its own view of the mosaic.

    Args:
        own: Channels of its own view.
        coarser: Channels of the coarser level; 0 where there is none.
        width: Channels that it works with.
        blocks: Residual convolutions.
    """

    def __init__(self, own: int, coarser: int, width: int, blocks: int) -> None:
        super().__init__()
        self.up = conv(coarser, own, 1) if coarser else None
        self.join = MultiKernel(2 * own if coarser else own, width)
        self.blocks = nn.ModuleList(conv(width, width) for _ in range(blocks))
        self.image = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, own: Tensor, coarser: Tensor | None) -> Tensor:
        """Return features of the level's own resolution; its image is made of them."""
        if self.up is not None and coarser is not None:
            own = torch.cat([own, double(self.up(coarser))], dim=1)
        x = self.join(own)
        for block in self.blocks:
            x = x + block(x)
        return x


class PyNet(nn.Module):
    """From the mosaic of a sensor to a photograph, from the coarsest level to the finest.

    Args:
        width: Channels of the level of the mosaic's colour planes; each coarser one has twice as many.
        levels: Number of levels below the full resolution, each of half the resolution of the one before.
        blocks: Residual convolutions of a level.
    """

    def __init__(self, width: int, levels: int, blocks: int) -> None:
        super().__init__()
        widths = [width * 2**index for index in range(levels)]
        views = [width // 2 for width in widths]
        self.views = nn.ModuleList(
            conv(4 if index == 0 else views[index - 1], view, stride=1 if index == 0 else 2)
            for index, view in enumerate(views)
        )
        self.levels = nn.ModuleList(
            Level(view, coarser, wide, blocks)
            for view, coarser, wide in zip(views, [*widths[1:], 0], widths, strict=True)
        )
        self.finest = nn.Sequential(conv(width, width), nn.PixelShuffle(2), nn.Conv2d(width // 4, 3, 3, padding=1))

    def forward(self, mosaic: Tensor) -> dict[str, Tensor]:
        """Develop a mosaic.

        Args:
            mosaic: Readings under a Bayer filter RGGB, of shape (batch, 1, height, width).

        Returns:
            ``image`` of shape (batch, 3, height, width), and the coarser levels' images: ``half`` of half its size,
            ``quarter``, ``eighth`` and so on down to the coarsest level.
        """
        views = []
        x = functional.pixel_unshuffle(mosaic, 2)  # one plane for each place in the filter
        for view in self.views:
            x = view(x)
            views.append(x)
        images: dict[str, Tensor] = {}
        features: Tensor | None = None
        for name, level, own in reversed(list(zip(LEVELS, self.levels, views, strict=False))):
            features = level(own, features)
            images[name] = level.image(features)
        return {"image": self.finest(features), **images}


def double(x: Tensor) -> Tensor:
    """Return features of twice the resolution."""
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def build(width: int = 32, levels: int = 3, blocks: int = 1) -> nn.Module:
    """Build the model; the paper's has five levels, and more convolutions in each.

    Raises:
        ValueError: There is no net of these sizes.
    """
    if not 1 <= levels <= len(LEVELS) or width % 8:
        raise ValueError(f"a PyNet has 1 to {len(LEVELS)} levels and a width in multiples of 8")
    return PyNet(width, levels, blocks)
