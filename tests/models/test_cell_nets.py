"""The space of cells: its decisions, its cost by hand, its shapes, settings out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mil_cli.errors import ModelError
from mil_cli.graph.model import Model
from mil_cli.models.cell_nets import OPERATORS, cell_nets
from mil_cli.spaces import CostCounter, DesignedSpace
from tests.spaces.nets import samples


def test_all_cells_have_one_architecture_unless_stages_are_to_differ() -> None:
    one = DesignedSpace(cell_nets(cells=(2, 1)))
    assert [decision.name for decision in one.decisions] == [f"edges.{index}" for index in range(6)]
    assert {len(decision.places) for decision in one.decisions} == {3}
    assert one.size == len(OPERATORS) ** 6
    apart = DesignedSpace(cell_nets(cells=(2, 1), per_stage=True))
    names = [f"cells.{cell}.edges.{index}" for cell in (0, 2) for index in range(6)]
    assert [decision.name for decision in apart.decisions] == names


def test_costs_by_hand() -> None:
    space = DesignedSpace(cell_nets(widths=(4, 8), nodes=2, num_classes=3))
    counter = CostCounter(space, (torch.zeros(1, 1, 28, 28),))
    fixed = 9 * 4 * 14**2 + 4 * 4 * 14**2 + 9 * 8 * 8 * 7**2 + 16 * 3
    one = space.architecture({"edges.0": "conv", "edges.1": "separable", "edges.2": "max"})
    conv = 9 * (4 * 4 * 14**2 + 8 * 8 * 7**2)
    separable = (9 * 4 + 4 * 4) * 14**2 + (9 * 8 + 8 * 8) * 7**2
    assert counter.macs(one) == fixed + conv + separable
    nothing = space.architecture(dict.fromkeys(("edges.0", "edges.1", "edges.2"), "none"))
    assert counter.macs(nothing) == fixed


def test_a_cell_by_hand() -> None:
    torch.manual_seed(0)
    space = DesignedSpace(cell_nets(widths=(4,), cells=(1,), nodes=2).eval())
    x = torch.randn(2, 4, 8, 8)
    cell = space.module.get_submodule("cells.0")
    with space.active(space.architecture({"edges.0": "skip", "edges.1": "mean", "edges.2": "conv"})):
        y = cell(x)
    start = cell.get_submodule("squeeze")(x)
    second = cell.get_submodule("nodes.1.edges.0.mean")(start) + cell.get_submodule("nodes.1.edges.1.conv")(start)
    torch.testing.assert_close(y, torch.cat([start, second], 1))


def test_architectures_are_captured_and_take_digits_too() -> None:
    space = DesignedSpace(cell_nets(stem_stride=1, widths=(4, 8)))
    x = torch.randn(2, 1, 8, 8)
    for one in samples(space, 3):
        built = space.build(one).eval()
        model = Model.capture(built, (x,))
        torch.testing.assert_close(model(x), built(x))
        assert model(x).shape == (2, 10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cells": (1,)}, "2 stages need 2"),
        ({"cells": (1, 0)}, r"model.cells\[1\]"),
        ({"widths": (4, 0)}, r"model.widths\[1\]"),
        ({"nodes": 0}, "model.nodes"),
        ({"stem_stride": 0}, "model.stem_stride"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        cell_nets(**settings)
