"""Operations and parameters without building, against the count of the captured model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mil_cli.errors import ModelError
from mil_cli.graph.model import Model
from mil_cli.models.small_nets import small_nets
from mil_cli.spaces import Choice, CostCounter, DesignedSpace
from tests.spaces.nets import conv_net, samples, transformer


def _small_nets() -> tuple[DesignedSpace, Tensor]:
    return DesignedSpace(small_nets()), torch.zeros(2, 1, 28, 28)


SPACES = {"conv_net": conv_net, "transformer": transformer, "small_nets": _small_nets}


@pytest.mark.parametrize("make", SPACES.values(), ids=SPACES)
def test_a_built_module_is_captured_like_any_other_and_counts_are_its(
    make: Callable[[], tuple[DesignedSpace, Tensor]],
) -> None:
    space, x = make()
    counter = CostCounter(space, (x[:1],))
    (one,) = samples(space, 1, seed=8)
    built = space.build(one).eval()
    model = Model.capture(built, (x,))
    torch.testing.assert_close(model(x), built(x), rtol=0, atol=1e-5)
    assert model.spec.batch is not None
    assert counter.macs(one) == model.macs()
    assert counter.params(one) == model.num_params()


@pytest.mark.parametrize("make", SPACES.values(), ids=SPACES)
def test_counts_are_those_of_torch_on_the_built_module(make: Callable[[], tuple[DesignedSpace, Tensor]]) -> None:
    space, x = make()
    counter = CostCounter(space, (x[:1],))
    counts = set()
    for one in [space.smallest, space.largest, *samples(space, 10)]:
        built = space.build(one).eval()
        with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
            built(x[:1])
        assert counter.macs(one) == flops.get_total_flops() / 2
        assert counter.params(one) == sum(parameter.numel() for parameter in built.parameters())
        counts.add(counter.macs(one))
    assert len(counts) >= 6


def test_what_is_remembered_changes_nothing() -> None:
    space, x = conv_net()
    used = CostCounter(space, (x[:1],))
    for one in samples(space, 100):
        used.macs(one)
    for one in samples(space, 10, seed=1):
        assert used.macs(one) == CostCounter(space, (x[:1],)).macs(one)


def test_tied_weights_count_once() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    space = DesignedSpace(nn.Sequential(first, second, Choice({"skip": nn.Identity(), "layer": nn.Linear(3, 3)})))
    counter = CostCounter(space, (torch.zeros(1, 3),))
    assert counter.params(space.smallest) == 9 + 3 + 3
    assert counter.params(space.largest) == 9 + 3 + 3 + 12


def test_operators_that_do_not_fit_are_told() -> None:
    space = DesignedSpace(nn.Sequential(Choice({"wide": nn.Linear(3, 5), "fits": nn.Linear(3, 4)}), nn.Linear(4, 2)))
    counter = CostCounter(space, (torch.zeros(1, 3),))
    assert counter.macs(space.architecture({"0": "fits"})) == 12 + 8
    with pytest.raises(ModelError, match="does not run on the shapes"):
        counter.macs(space.architecture({"0": "wide"}))
