"""The sweep over widths and bits: its diagonals hold files of one size, as its header says."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from mil_cli.models.resnet import resnet20
from mil_cli.recipe.compose import sweep_points

RECIPE = Path(__file__).parents[2] / "recipes" / "fashion_mnist" / "large_few_bits_or_small_many_bits.yaml"


def bits_of_weights(width: int, bits: int) -> int:
    net = resnet20(in_channels=1, num_classes=10, width=width)
    inner = [module for module in net.modules() if isinstance(module, nn.Conv2d) and module is not net.stem]
    return bits * sum(module.weight.numel() for module in inner)


def test_every_width_meets_every_number_of_bits_and_diagonals_are_of_one_size() -> None:
    points = sweep_points(RECIPE, [])
    assert points is not None
    found = {(point.content["model"]["width"], point.content["stages"]["quantize"]["weight_bits"]) for point in points}
    widths, bits = sorted({width for width, _ in found}), sorted({bits for _, bits in found}, reverse=True)
    assert len(points) == len(found) == len(widths) * len(bits) == 9
    assert len({str(point.content["data"]) for point in points}) == 1
    diagonal = [bits_of_weights(*each) for each in zip(widths, bits, strict=True)]
    assert diagonal == pytest.approx([diagonal[0]] * 3, rel=0.04)
    beside = [bits_of_weights(*each) for each in zip(widths[1:], bits, strict=False)]
    assert beside == pytest.approx([beside[0]] * 2, rel=0.04)
