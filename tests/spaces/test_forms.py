"""Which architectures are the same plain module, against building all of them."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import nn

from mil_cli.models.small_nets import small_nets
from mil_cli.spaces import Architecture, BatchNorm2d, Choice, Conv2d, DesignedSpace, Kernel, Linear, Repeat, Width
from tests.spaces.nets import samples


class Net(nn.Module):
    """Skips among blocks, a width across the net, one inside an operator, a kernel, nested choices."""

    def __init__(self) -> None:
        super().__init__()
        width = Width([2, 3])
        self.stem = Conv2d(1, width, 1)
        self.first = Repeat([self._block(width) for _ in range(2)], least=1)
        self.second = Repeat([self._block(width) for _ in range(2)], least=0)

    @staticmethod
    def _block(width: Width) -> Choice:
        kernel, hidden = Kernel([1, 3]), Width([1, 2])
        norm = Choice({"norm": BatchNorm2d(width), "skip": nn.Identity()})
        conv = nn.Sequential(Conv2d(width, width, kernel, padding=kernel // 2), norm)
        return Choice(
            {
                "conv": conv,
                "mlp": nn.Sequential(Conv2d(width, hidden, 1), Conv2d(hidden, width, 1)),
                "skip": nn.Identity(),
            }
        )

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(self.stem(x)))


def _everything(space: DesignedSpace) -> list[Architecture]:
    axes = [range(len(decision.choices)) for decision in space.decisions]
    return [space.at(indices) for indices in itertools.product(*axes)]


def _shown(module: nn.Module) -> str:
    """Return the layers of a built net in order, with the repeats that they are in."""
    parts = []
    for name in ("stem", "first", "second"):
        part = module.get_submodule(name)
        parts.append([str(layer) for layer in part.modules() if not isinstance(layer, nn.Sequential | nn.Identity)])
    return re.sub(r"\s", "", str(parts))


def test_forms_are_equal_where_the_layers_are() -> None:
    space = DesignedSpace(Net())
    chosen = samples(space, 80)
    by_form = {space.form(one): _shown(space.build(one, inherit=True)) for one in chosen}
    by_layers = {_shown(space.build(one, inherit=True)) for one in chosen}
    assert len(by_form) == len(by_layers) == len(set(by_form.values())) < len(set(chosen))
    assert len(space.unique(chosen)) == len(by_layers)


def test_the_number_of_distinct_architectures_by_listing_all() -> None:
    space = DesignedSpace(nn.Sequential(Net().first))
    listed = set(_everything(space))
    assert len(listed) < space.size
    assert space.distinct() == len({space.form(one) for one in listed})


def test_the_number_of_distinct_architectures_by_hand() -> None:
    # Two blocks or less, each one of 2 * 2 convolutions or 2 pairs of them. At width 2 the pair with 2 hidden channels
    # is what two blocks of 1x1 convolutions are, and with one more it is the same on either side.
    wide = 1 + 6 + 36
    narrow = wide - 2
    count = wide**2 + narrow**2
    space = DesignedSpace(Net())
    assert space.distinct() == count
    # A list of the whole says the same as the product of its parts.
    assert DesignedSpace(nn.Sequential(nn.ModuleList([Net()]))).distinct() == count
    assert space.distinct(limit=10) is None


def test_the_small_nets_are_as_many_as_their_blocks_give() -> None:
    # 1 convolution, 2 separable ones, 2 * 2 inverted residuals; up to two or three of them; three widths of each stage.
    first, later = sum(7**count for count in range(3)), sum(7**count for count in range(4))
    assert DesignedSpace(small_nets()).distinct() == 3**3 * first * later * later


def test_a_choice_that_stands_in_two_places_is_the_same_in_both() -> None:
    block = Choice({"conv": Conv2d(2, 2, 1), "skip": nn.Identity()})
    assert DesignedSpace(nn.ModuleList([nn.Sequential(block), nn.Sequential(block)])).distinct() == 2


def test_a_depth_that_stands_in_two_places_is_not_counted() -> None:
    blocks = Repeat([Conv2d(2, 2, 1), Conv2d(2, 2, 1)], least=0)
    assert DesignedSpace(nn.ModuleList([nn.Sequential(blocks), nn.Sequential(blocks)])).distinct() is None


@pytest.mark.parametrize("setting", [{"stride": 2}, {"padding": 1}, {"bias": False}])
def test_settings_tell_layers_apart(setting: dict[str, Any]) -> None:
    choice = Choice(
        {"one": Conv2d(2, 2, 3), "same": nn.Conv2d(2, Width([2]).largest, 3), "other": nn.Conv2d(2, 2, 3, **setting)}
    )
    space = DesignedSpace(nn.Sequential(choice))
    one, same, other = (space.form(space.architecture({"0": name})) for name in choice.names)
    assert one == same != other


class _Split(nn.Module):
    def __init__(self, heads: Width) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), int(self.heads), -1).softmax(-1).flatten(1)


def test_what_a_module_reads_itself_tells_architectures_apart() -> None:
    heads = Width([2, 4])
    operators = {"split": nn.Sequential(nn.Linear(8, 8), _Split(heads)), "skip": nn.Identity()}
    space = DesignedSpace(nn.Sequential(Choice(operators)))
    assert [decision.name for decision in space.decisions] == ["0", "0.split.1.heads"]
    two, four = (space.architecture({"0": "split", "0.split.1.heads": count}) for count in (2, 4))
    assert space.form(two) != space.form(four)
    assert space.distinct() == 3
    assert space.architecture({"0": "skip", "0.split.1.heads": 2}) == {"0": "skip"}
    built = space.build(two)
    assert built.get_submodule("0.1").heads == 2


def test_equal_products_of_other_factors_are_other_nets() -> None:
    heads, features = Width([2, 3]), Width([2, 3])
    space = DesignedSpace(nn.Sequential(Linear(4, heads * features)))
    assert space.distinct() == len({space.form(one) for one in _everything(space)}) == 4


def test_a_width_that_the_whole_has_does_not_tell_skips_apart() -> None:
    net = nn.Module()
    net.hidden = Width([2, 3])  # type: ignore[assignment]
    net.op = Choice({"mlp": nn.Sequential(Linear(4, net.hidden), Linear(net.hidden, 4)), "skip": nn.Identity()})  # type: ignore[arg-type]
    space = DesignedSpace(net)
    assert [decision.name for decision in space.decisions] == ["op", "hidden"]
    assert space.distinct() == len({space.form(one) for one in _everything(space)}) == 3
