"""One decision for several choices, sums over edges, mixtures on a part of the channels."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from mil_cli.errors import ModelError
from mil_cli.spaces import (
    BatchNorm2d,
    Channels,
    Choice,
    Conv2d,
    CostCounter,
    DesignedSpace,
    Node,
    OneOf,
    Zero,
)


def _choice(decision: OneOf | None = None, width: int = 2) -> Choice:
    channels = Channels(width)
    operators = {"none": Zero(), "skip": nn.Identity(), "conv": Conv2d(channels, channels, 1)}
    return Choice(operators, decision, channels)


class Net(nn.Module):
    """Two cells of one decision, one of its own in between."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = OneOf(["none", "skip", "conv"])
        self.cells = nn.Sequential(_choice(self.kind), _choice(), _choice(self.kind))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cells(x)  # type: ignore[no-any-return]


def test_choices_of_one_decision_are_one_decision() -> None:
    space = DesignedSpace(Net())
    assert [(one.name, len(one.choices)) for one in space.decisions] == [("kind", 3), ("cells.1", 3)]
    assert space.size == 9
    assert len(space.encoding_names) == 6
    one = space.architecture({"kind": "skip", "cells.1": "conv"})
    assert space.encode(one).tolist() == [0, 1, 0, 0, 0, 1]
    assert space.at(space.indices(one)) == one


def test_what_is_built_runs_as_the_shared_module_does() -> None:
    space, x = DesignedSpace(Net()), torch.randn(3, 2, 4, 4)
    counter = CostCounter(space, (x[:1],))
    for kind, own in itertools.product(("none", "skip", "conv"), repeat=2):
        one = space.architecture({"kind": kind, "cells.1": own})
        built = space.build(one, inherit=True)
        assert built.kind == kind
        with space.active(one):
            torch.testing.assert_close(built(x), space.module(x))
        convolutions = 2 * (kind == "conv") + (own == "conv")
        assert counter.macs(one) == convolutions * 4 * 16
        assert counter.params(one) == sum(weight.numel() for weight in built.parameters()) == convolutions * 6


def test_choices_of_one_decision_have_weights_of_their_own() -> None:
    space = DesignedSpace(Net())
    built = space.build(space.architecture({"kind": "conv", "cells.1": "skip"}), inherit=True)
    first, last = (built.get_submodule(f"cells.{index}").weight for index in (0, 2))
    assert not torch.equal(first, last)  # type: ignore[arg-type]


def test_a_mixture_mixes_all_choices_of_a_decision() -> None:
    space, x = DesignedSpace(Net()), torch.randn(3, 2, 4, 4)
    shared, own = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.0, 1.0, 0.0])
    with space.mixed({"kind": shared, "cells.1": own}):
        mixed = space.module(x)
    y = x
    for index, weights in ((0, shared), (1, own), (2, shared)):
        y = weights[1] * y + weights[2] * space.module.get_submodule(f"cells.{index}.conv")(y)
    torch.testing.assert_close(mixed, y)


def test_distinct_nets_are_counted_as_a_list_of_all_has_them() -> None:
    space = DesignedSpace(Net())
    listed = [space.at(indices) for indices in itertools.product(range(3), repeat=2)]
    # Three of one decision are nine nets, none of which is another: (skip, conv) and (conv, skip) have 1 and 2 layers.
    assert space.distinct() == len({space.form(one) for one in listed}) == 9
    cells = [nn.Sequential(_choice(decision)) for decision in [OneOf(["none", "skip", "conv"])] * 3]
    assert DesignedSpace(nn.ModuleList(cells)).distinct() == 3
    assert DesignedSpace(nn.ModuleList(cells)).distinct(limit=2) is None


def test_copies_share_among_themselves_and_not_with_the_first() -> None:
    space = DesignedSpace(Net())
    other = DesignedSpace(copy.deepcopy(space.module))
    x = torch.randn(1, 2, 3, 3)
    with other.active(other.architecture({"kind": "none", "cells.1": "skip"})):
        assert not other.module(x).any()
        with space.active(space.architecture({"kind": "skip", "cells.1": "skip"})):
            torch.testing.assert_close(space.module(x), x)


def test_a_node_is_the_sum_of_its_edges_and_leaves_out_those_that_give_nothing() -> None:
    node = Node([_choice(), _choice(), _choice()])
    space = DesignedSpace(node)
    inputs = [torch.randn(2, 2, 3, 3) for _ in range(3)]
    one = space.architecture({"edges.0": "none", "edges.1": "skip", "edges.2": "conv"})
    built = space.build(one, inherit=True)
    expected = inputs[1] + node.get_submodule("edges.2.conv")(inputs[2])
    torch.testing.assert_close(built(inputs), expected)
    exported = torch.export.export(built, (inputs,))
    targets = [str(one.target) for one in exported.graph.nodes if one.op == "call_function"]
    assert not any("zeros" in target for target in targets)
    nothing = space.build(space.architecture(dict.fromkeys(("edges.0", "edges.1", "edges.2"), "none")))
    assert nothing(inputs).shape == inputs[0].shape
    assert not nothing(inputs).any()


def test_a_mixture_on_a_part_of_the_channels_by_hand() -> None:
    torch.manual_seed(0)
    width = Channels(8)
    conv, norm = Conv2d(width, width, 3, padding=1, bias=False), BatchNorm2d(width)
    choice = Choice({"conv": nn.Sequential(conv, norm), "skip": nn.Identity()}, width=width)
    space, x = DesignedSpace(nn.Sequential(choice)), torch.randn(2, 8, 5, 5)
    weights = torch.tensor([0.3, 0.5])
    with space.mixed({"0": weights}, share=4):
        y = space.module(x)
    few = nn.functional.conv2d(x[:, :2], conv.weight[:2, :2], padding=1)
    few = nn.functional.batch_norm(few, None, None, training=True)
    parts = [0.3 * few + 0.5 * x[:, :2], *(0.8 * x[:, start : start + 2] for start in (2, 4, 6))]
    # Shuffled: the first channel of each part, then the second of each.
    expected = torch.stack([part[:, channel] for channel in (0, 1) for part in parts], 1)
    torch.testing.assert_close(y, expected)
    assert int(width) == 8
    assert norm.running_mean is not None
    assert norm.running_mean[:2].all()
    assert not norm.running_mean[2:].any()


def test_operators_that_cannot_run_on_a_part_are_told() -> None:
    for choice, words in (
        (Choice({"skip": nn.Identity()}), "one of 4 channels"),
        (_choice(width=6), "one of 4 channels .got Channels.6."),
    ):
        space = DesignedSpace(nn.Sequential(choice))
        with pytest.raises(ModelError, match=words), space.mixed({"0": torch.ones(len(choice.names))}, share=4):
            pass


def _circle() -> nn.Module:
    first, second = OneOf(["a"]), OneOf(["a"])
    inner = Choice({"a": nn.Identity()}, second)
    return nn.ModuleList(
        [
            Choice({"a": inner}, first),
            Choice({"a": nn.Sequential(Choice({"a": nn.Identity()}, first))}, second),
        ]
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OneOf([]), "different names"),
        (lambda: OneOf(["a", "a"]), "different names"),
        (lambda: OneOf("ab"), "different names"),
        (lambda: Choice({"a": Zero()}, OneOf(["b"])), "must be those of its decision: b"),
        (lambda: Choice({"b": Zero(), "a": Zero()}, OneOf(["a", "b"])), "must be those of its decision: a, b"),
        (lambda: Node([]), "at least one edge"),
        (lambda: Channels(0), "at least 1"),
        (lambda: Channels(True), "at least 1"),
        (lambda: DesignedSpace(_circle()), "says whether it is made itself"),
    ],
)
def test_what_cannot_be_is_told(make: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        make()
