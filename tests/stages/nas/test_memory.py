"""The memory of architectures without a capture, against the estimate on the captured model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mil_cli.errors import ModelError
from mil_cli.graph.coupling import Counter, MemoryEstimate, analyse
from mil_cli.graph.model import Model
from mil_cli.spaces import Choice, DesignedSpace
from mil_cli.stages.nas.memory import ArchitectureMemory
from tests.spaces.nets import conv_net, samples, transformer


@pytest.mark.parametrize("make", [conv_net, transformer])
def test_memory_is_what_the_captured_architecture_says(make: Callable[[], tuple[DesignedSpace, Tensor]]) -> None:
    space, x = make()
    memory = ArchitectureMemory(space, (x[:1],))
    many = samples(space, 40)
    known = [memory(one) for one in many]
    assert len(set(known)) >= 8
    assert known == [memory(one) for one in many]
    built = space.build(many[0]).eval()
    assert known[0] == MemoryEstimate(Counter(analyse(Model.capture(built, (x,)))))({})


def test_tied_weights_count_once() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    space = DesignedSpace(nn.Sequential(first, second, Choice({"skip": nn.Identity(), "layer": nn.Linear(3, 3)})))
    memory = ArchitectureMemory(space, (torch.zeros(1, 3),))
    # the input, which is the caller's, and what two layers in a row read and give: three vectors at the most
    assert memory(space.smallest) == 4 * (9 + 3 + 3 + 3 * 3)
    assert memory(space.largest) == 4 * (9 + 3 + 3 + 12 + 3 * 3)


def test_operators_that_do_not_fit_are_told() -> None:
    space = DesignedSpace(nn.Sequential(Choice({"wide": nn.Linear(3, 5), "fits": nn.Linear(3, 4)}), nn.Linear(4, 2)))
    memory = ArchitectureMemory(space, (torch.zeros(1, 3),))
    with pytest.raises(ModelError, match="does not run on the shapes"):
        memory(space.architecture({"0": "wide"}))
