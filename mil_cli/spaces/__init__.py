"""Designed search spaces: what a user puts into a module so that a smaller or better one can be searched in it."""

from mil_cli.spaces.architecture import Architecture
from mil_cli.spaces.balanced import sample_balanced
from mil_cli.spaces.blocks import Choice, Node, OneOf, Repeat, Zero
from mil_cli.spaces.cost import CostCounter
from mil_cli.spaces.layers import BatchNorm2d, Conv2d, LayerNorm, Linear
from mil_cli.spaces.sizes import Channels, Kernel, Width
from mil_cli.spaces.space import DesignedSpace

__all__ = [
    "Architecture",
    "BatchNorm2d",
    "Channels",
    "Choice",
    "Conv2d",
    "CostCounter",
    "DesignedSpace",
    "Kernel",
    "LayerNorm",
    "Linear",
    "Node",
    "OneOf",
    "Repeat",
    "Width",
    "Zero",
    "sample_balanced",
]
