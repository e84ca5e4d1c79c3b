"""The space of small nets: its size, its range of operations, settings out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mil_cli.errors import ModelError
from mil_cli.models.small_nets import small_nets
from mil_cli.spaces import CostCounter, DesignedSpace
from tests.spaces.nets import samples


def test_it_has_many_small_nets() -> None:
    space = DesignedSpace(small_nets())
    drawn = samples(space, 100)
    assert len(space.unique(drawn)) > 95
    costs = CostCounter(space, (torch.zeros(1, 1, 28, 28),))
    macs = torch.tensor([costs.macs(one) for one in drawn], dtype=torch.float64)
    assert macs.max() < 3.1e6
    assert macs.quantile(0.9) > 5 * macs.quantile(0.1)


def test_the_smallest_and_the_largest_by_hand() -> None:
    space = DesignedSpace(small_nets(num_classes=7, widths=((4, 8), (16,)), blocks=(1, 2)))
    costs = CostCounter(space, (torch.zeros(1, 1, 28, 28),))
    stages = 9 * 1 * 4 * 14**2 + 9 * 4 * 16 * 7**2
    assert costs.macs(space.smallest) == stages + 16 * 7
    convolutions = {name: "conv" for name in ("stages.0.3.0", "stages.1.3.0", "stages.1.3.1")}
    depths = {"widths.0": 8, "widths.1": 16, "stages.0.3": 1, "stages.1.3": 2}
    stages = 9 * 1 * 8 * 14**2 + 9 * 8 * 16 * 7**2
    blocks = 9 * 8 * 8 * 14**2 + 2 * 9 * 16 * 16 * 7**2
    assert costs.macs(space.architecture({**depths, **convolutions})) == stages + blocks + 16 * 7


def test_every_operator_keeps_the_shape() -> None:
    space = DesignedSpace(small_nets(in_channels=3, num_classes=5))
    x = torch.randn(2, 3, 28, 28)
    for one in samples(space, 20):
        with space.active(one):
            assert space.module(x).shape == (2, 5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"blocks": (1, 2)}, "3 stages need 3"),
        ({"blocks": (1, 0, 2)}, r"model.blocks\[1\]"),
        ({"widths": ((4, 0), (8,), (8,))}, "Width: a choice must be"),
        ({"widths": ((), (8,), (8,))}, "Width: needs a list"),
        ({"widths": (4, 8, 8)}, "Width: needs a list"),
        ({"num_classes": 0}, "model.num_classes"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        small_nets(**settings)
