"""A small HRNet (Wang et al. 2020, arXiv:1908.07919): branches of several resolutions that exchange what they know."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, relu: bool = True) -> nn.Sequential:
    """Return a convolution with batch norm and, if wanted, a rectifier."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


class Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, width), conv(width, width, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        return functional.relu(x + self.body(x))


class Bottleneck(nn.Module):
    """A residual block of a 1x1, a 3x3 and a 1x1 convolution that changes the width."""

    def __init__(self, inputs: int, inner: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(inputs, inner, 1), conv(inner, inner), conv(inner, outputs, 1, relu=False))
        self.shortcut = conv(inputs, outputs, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same resolution."""
        return functional.relu(self.shortcut(x) + self.body(x))


class Exchange(nn.Module):
    """Adds to each branch what all the others know, brought to its resolution and width."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            nn.ModuleList(self._path(widths, source, target) for source in range(len(widths)))
            for target in range(len(widths))
        )

    @staticmethod
    def _path(widths: list[int], source: int, target: int) -> nn.Module:
        if source == target:
            return nn.Identity()
        if source > target:  # from a coarser branch
            up = nn.Upsample(scale_factor=2.0 ** (source - target), mode="nearest")
            return nn.Sequential(conv(widths[source], widths[target], 1, relu=False), up)
        steps = [conv(widths[source], widths[source], stride=2) for _ in range(target - source - 1)]
        return nn.Sequential(*steps, conv(widths[source], widths[target], stride=2, relu=False))

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        """Return features of the same shapes."""
        mixed = []
        for paths in self.paths:
            total = paths[0](branches[0])
            for path, branch in zip(paths[1:], branches[1:], strict=True):
                total = total + path(branch)
            mixed.append(functional.relu(total))
        return mixed


class Stage(nn.Module):
    """Adds a coarser branch, runs residual blocks on each branch, and lets the branches exchange."""

    def __init__(self, widths: list[int], blocks: int) -> None:
        super().__init__()
        self.new_branch = conv(widths[-2], widths[-1], stride=2)
        self.branches = nn.ModuleList(nn.Sequential(*(Block(width) for _ in range(blocks))) for width in widths)
        self.exchange = Exchange(widths)

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        """Return one branch more than came in."""
        branches = [*branches, self.new_branch(branches[-1])]
        return self.exchange([run(branch) for run, branch in zip(self.branches, branches, strict=True)])


class HRNet(nn.Module):
    """A net that keeps a fine resolution from end to end.

    Args:
        classes: Classes of a pixel.
        width: Channels of the finest branch; each coarser one has twice as many.
        branches: Number of branches, each of half the resolution of the one before.
        blocks: Residual blocks of a branch in each stage.
        stem: Channels of the first layers.
    """

    def __init__(self, classes: int, width: int, branches: int, blocks: int, stem: int) -> None:
        super().__init__()
        widths = [width * 2**index for index in range(branches)]
        self.stem = nn.Sequential(
            conv(3, stem, stride=2), conv(stem, stem, stride=2), Bottleneck(stem, stem, 4 * stem), conv(4 * stem, width)
        )
        self.stages = nn.ModuleList(Stage(widths[: count + 1], blocks) for count in range(1, branches))
        self.head = nn.Sequential(conv(sum(widths), sum(widths), 1), nn.Conv2d(sum(widths), classes, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Return scores of shape (batch, classes, height, width) for images of shape (batch, 3, height, width)."""
        branches = [self.stem(image)]
        for stage in self.stages:
            branches = stage(branches)
        size = branches[0].shape[-2:]
        coarser = [
            functional.interpolate(branch, size=size, mode="bilinear", align_corners=False) for branch in branches[1:]
        ]
        scores = self.head(torch.cat([branches[0], *coarser], dim=1))
        return functional.interpolate(scores, scale_factor=4.0, mode="bilinear", align_corners=False)


def build(classes: int = 11, width: int = 16, branches: int = 4, blocks: int = 2, stem: int = 32) -> nn.Module:
    """Build the model; by default with the widths and depths of HRNet-W18-small, and half its stem."""
    return HRNet(classes, width, branches, blocks, stem)
