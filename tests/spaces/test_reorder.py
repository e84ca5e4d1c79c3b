"""Channels in order of importance: the net computes the same, and the first channels are the heavy ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mil_cli.models.slimmable_resnet import slimmable_resnet
from mil_cli.models.small_nets import small_nets
from mil_cli.spaces import BatchNorm2d, Conv2d, DesignedSpace, Linear, Width
from mil_cli.spaces.reorder import reorder_channels


class Net(nn.Module):
    """A width that layers read and make, a depthwise one among them, and features that are a factor of another."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.heads = Width([2, 6]), Width([1, 2])
        self.first = Conv2d(1, self.width, 3, padding=1)
        self.norm = BatchNorm2d(self.width)
        self.depthwise = Conv2d(self.width, self.width, 3, padding=1, groups=self.width)
        hidden = self.heads * 3
        self.last = Linear(self.width, hidden)
        self.out = Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.norm(self.first(x))))
        return torch.as_tensor(self.out(torch.relu(self.last(x.mean((2, 3))))))


def test_the_first_channels_are_made_by_the_largest_weights_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    space, x = DesignedSpace(Net().eval()), torch.randn(4, 1, 6, 6)
    module = space.module
    nn.init.uniform_(module.norm.weight, 0.5, 2)
    nn.init.uniform_(module.norm.running_mean)
    before, expected = copy.deepcopy(module), module(x)
    weights = [layer.weight.detach().abs().flatten(1).sum(1) for layer in (module.first, module.depthwise)]
    order = sum(weights, torch.zeros(6)).argsort(descending=True)
    assert order.tolist() != list(range(6))
    assert reorder_channels(space, (x,)) == ["first.out_channels", "last.out_features"]
    torch.testing.assert_close(module(x), expected)
    assert torch.equal(module.first.weight, before.first.weight[order])
    assert torch.equal(module.norm.running_mean, before.norm.running_mean[order])
    hidden = before.last.weight.abs().sum(1).argsort(descending=True)
    assert torch.equal(module.last.weight, before.last.weight[hidden][:, order])
    assert torch.equal(module.out.weight, before.out.weight[:, hidden])
    assert not module.training


@pytest.mark.parametrize("build", [small_nets, slimmable_resnet])
def test_spaces_of_whole_nets_are_put_in_order(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    space, x = DesignedSpace(build().eval()), torch.randn(2, 1, 28, 28)
    expected = space.module(x)
    kept = {id(size) for layer in space.module.modules() if isinstance(layer, Conv2d) for size in layer.sizes.values()}
    made = {
        id(layer.sizes["out_channels"])
        for layer in space.module.modules()
        if isinstance(layer, Conv2d) and "out_channels" in layer.sizes
    }
    assert made <= kept
    assert len(reorder_channels(space, (x,))) == len(made)
    torch.testing.assert_close(space.module(x), expected, rtol=1e-4, atol=1e-5)


def test_channels_that_others_tell_apart_stay_where_they_are() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = Width([2, 4])
            self.first, self.last = Conv2d(1, self.width, 1), Conv2d(self.width, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            ramp = torch.arange(1.0, int(self.width) + 1)
            return torch.as_tensor(self.last(self.first(x) * ramp[:, None, None]))

    torch.manual_seed(1)
    space, x = DesignedSpace(Sum().eval()), torch.randn(2, 1, 3, 3)
    before = copy.deepcopy(space.module.state_dict())
    assert reorder_channels(space, (x,)) == []
    assert all(torch.equal(value, before[name]) for name, value in space.module.state_dict().items())
