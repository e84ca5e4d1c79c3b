"""Architectures spread over their costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mil_cli.errors import ModelError
from mil_cli.models.small_nets import small_nets
from mil_cli.spaces import CostCounter, DesignedSpace, Linear, Width, sample_balanced


def test_every_stratum_has_its_share() -> None:
    space = DesignedSpace(small_nets())
    cost = CostCounter(space, (torch.zeros(1, 1, 28, 28),)).params
    low, high = 5_000, 45_000

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        chosen = sample_balanced(space, cost, generator, count=24, low=low, high=high, strata=4)
        assert len({space.form(one) for one in chosen}) == 24
        return [cost(one) for one in chosen]

    costs = draw(0)
    counts = torch.histc(torch.tensor(costs, dtype=torch.float64), bins=4, min=low, max=high)
    assert counts.tolist() == [6] * 4
    assert draw(0) == costs != draw(1)


def test_a_range_that_is_empty_is_told() -> None:
    space = DesignedSpace(small_nets())
    with pytest.raises(ModelError, match="0 different architectures between 5 and 6 were met, 3 are wanted"):
        sample_balanced(space, lambda one: 1.0, torch.Generator(), count=3, low=5, high=6)


def test_a_range_the_wrong_way_round_is_told() -> None:
    with pytest.raises(ModelError, match="must be above the smallest"):
        sample_balanced(DesignedSpace(small_nets()), lambda one: 1.0, torch.Generator(), count=3, low=6, high=6)


def test_what_is_seldom_met_is_made_up_for() -> None:
    space = DesignedSpace(small_nets())
    chosen = sample_balanced(space, lambda one: 0.1, torch.Generator(), count=7, low=0, high=1, strata=4, tries=3)
    assert len(chosen) == 7


def test_both_ends_of_a_range_belong_to_it() -> None:
    space = DesignedSpace(nn.Sequential(Linear(1, Width([1, 2, 3]), bias=False)))
    counter = CostCounter(space, (torch.zeros(1, 1),))
    generator = torch.Generator().manual_seed(0)
    chosen = sample_balanced(space, counter.macs, generator, count=3, low=1, high=3, strata=2)
    assert sorted(map(counter.macs, chosen)) == [1, 2, 3]
