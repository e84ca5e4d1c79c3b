"""A search space of cells for small grey images: between the nodes of a cell, each edge is one of six operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from mil_cli.models.checks import check_positive, check_stages
from mil_cli.spaces import BatchNorm2d, Channels, Choice, Conv2d, Node, OneOf, Zero

OPERATORS = ("none", "skip", "conv", "separable", "mean", "max")
"""What an edge may be: nothing, the identity, 3x3 convolutions, 3x3 pooling by mean and by maximum."""


def _edge(width: Channels, decision: OneOf) -> Choice:
    operators = (
        Zero(),
        nn.Identity(),
        nn.Sequential(nn.ReLU(), Conv2d(width, width, 3, padding=1, bias=False), BatchNorm2d(width)),
        nn.Sequential(
            nn.ReLU(),
            Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            Conv2d(width, width, 1, bias=False),
            BatchNorm2d(width),
        ),
        nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
        nn.MaxPool2d(3, stride=1, padding=1),
    )
    return Choice(dict(zip(OPERATORS, operators, strict=True)), decision, width)


class Cell(nn.Module):
    """Nodes that each add up what the edges from all earlier ones give; the result is all of them side by side.

    Args:
        in_channels: Channels of the input.
        width: Channels of each node.
        stride: Of the convolution that brings the input to that width.
        edges: What each edge is: that into the first node from the input, those into the second from the input and from
            the first node, and so on.
    """

    def __init__(self, in_channels: int, width: int, stride: int, edges: Sequence[OneOf]) -> None:
        super().__init__()
        kernel = 1 if stride == 1 else 3
        self.squeeze = nn.Sequential(
            nn.ReLU(), nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width)
        )
        self.edges = list(edges)
        channels = Channels(width)
        nodes: list[nn.Module] = []
        first = 0
        while first < len(edges):
            into = edges[first : first + len(nodes) + 1]
            first += len(into)
            nodes.append(Node([_edge(channels, edge) for edge in into]))
        self.nodes = nn.ModuleList(nodes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, h, w) to (batch, nodes * width, h / stride, w / stride)."""
        states = [self.squeeze(x)]
        for node in self.nodes:
            states.append(node(states))
        return torch.cat(states[1:], 1)


class CellNet(nn.Module):
    """A strided convolution, stages of cells of which each but the first halves the resolution, pooling, a classifier.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        widths: Channels of a node in each stage.
        cells: Cells of each stage.
        nodes: Nodes of a cell, without its input.
        stem_stride: Stride of the first convolution.
        per_stage: Whether the cells of a stage have edges of their own; else all cells have the same.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        cells: Sequence[int],
        nodes: int,
        stem_stride: int,
        per_stage: bool,
    ) -> None:
        super().__init__()
        count = nodes * (nodes + 1) // 2
        if not per_stage:
            self.edges = [OneOf(OPERATORS) for _ in range(count)]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, stem_stride, 1, bias=False), nn.BatchNorm2d(widths[0])
        )
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, (width, number) in enumerate(zip(widths, cells, strict=True)):
            edges = [OneOf(OPERATORS) for _ in range(count)] if per_stage else self.edges
            for cell in range(number):
                layers.append(Cell(channels, width, 2 if stage > 0 and cell == 0 else 1, edges))
                channels = nodes * width
        self.cells = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, in_channels, h, w) to class scores (batch, num_classes)."""
        x = functional.relu(self.cells(self.stem(x)))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def cell_nets(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    widths: Sequence[int] = (8, 16),
    cells: Sequence[int] = (1, 1),
    nodes: int = 3,
    stem_stride: int = 2,
    per_stage: bool = False,
) -> CellNet:
    """Build a space of cells, in the form of Liu et al. 2019, "DARTS", and Dong and Yang 2020, "NAS-Bench-201".

    A cell is a graph whose edges lead from each node to all later ones. Which operator an edge is, is one decision for
    all cells (as in NAS-Bench-201, whose operators these are, with pooling by maximum and separable convolutions); a
    cell gives all its nodes (as in DARTS), and takes one input.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        widths: Channels of a node in each stage.
        cells: Cells of each stage.
        nodes: Nodes of a cell, without its input; a cell has ``nodes * (nodes + 1) / 2`` edges.
        stem_stride: Stride of the first convolution; 1 for images of 8x8.
        per_stage: Whether the cells of each stage have an architecture of their own.

    Raises:
        ModelError: A setting is out of range.
    """
    check_positive({"num_classes": num_classes, "in_channels": in_channels, "nodes": nodes, "stem_stride": stem_stride})
    check_positive({f"widths[{index}]": value for index, value in enumerate(widths)})
    check_positive({f"cells[{index}]": value for index, value in enumerate(cells)})
    check_stages(widths, cells)
    return CellNet(
        in_channels=in_channels,
        num_classes=num_classes,
        widths=widths,
        cells=cells,
        nodes=nodes,
        stem_stride=stem_stride,
        per_stage=per_stage,
    )
