"""The part of a graph between two values computes what the whole computes there, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name
from mil_cli.graph.segment import overwritten, segment
from mil_cli.graph.watch import watched


class Attention(nn.Module):
    """A block that reads a size of the input, a mask, and a table that depends on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.query, self.mix = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x)
        heads = self.query(x + self.table.tanh()).reshape(x.shape[0], -1, 2, 4).transpose(1, 2)
        weights = (heads @ heads.transpose(2, 3) + mask.unsqueeze(1)).softmax(-1)
        y = (weights @ heads).transpose(1, 2).reshape(x.shape[0], -1, 8)
        return torch.relu(x + self.mix(y)).mean(1)


@pytest.fixture(scope="module")
def captured() -> Model:
    torch.manual_seed(0)
    args = (torch.randn(2, 5, 4), torch.randn(2, 5, 5))
    return Model.capture(Attention().eval(), args)


@pytest.fixture
def model(captured: Model) -> Model:
    torch.manual_seed(0)
    return captured.clone()


def named(model: Model, name: str) -> Node:
    return next(node for node in calls(model.graph) if op_name(node) == name)


def values(model: Model, nodes: tuple[Node, ...], *args: Tensor) -> list[Tensor]:
    found: dict[Node, Tensor] = {}
    looks = {node: (lambda value, node=node: found.__setitem__(node, value)) for node in nodes}
    watched(model.graph, looks)(*args)
    return [found[node] for node in nodes]


@pytest.mark.parametrize("batch", [2, 3])
def test_a_part_computes_what_the_whole_does(model: Model, batch: int) -> None:
    part = segment(model.graph, named(model, "linear"), named(model, "relu"))
    generator = torch.Generator().manual_seed(1)
    args = torch.randn(batch, 5, 4, generator=generator), torch.randn(batch, 5, 5, generator=generator)
    *inputs, expected = values(model, (*part.inputs, part.end), *args)
    module = part.module(model.graph)
    assert torch.equal(module(*inputs), expected)
    assert len(inputs) > 1  # the mask too
    assert not any(value.requires_grad for value in module.parameters())
    outside = {str(node.target) for node in part.nodes if node.op == "get_attr"}
    assert outside == {"table", "query.weight", "query.bias", "mix.weight", "mix.bias"}


def test_it_shares_the_weights_and_leaves_the_graph_alone(model: Model) -> None:
    before = model.fingerprint()
    part = segment(model.graph, named(model, "linear"), named(model, "relu"))
    module = part.module(model.graph)
    inputs = values(model, part.inputs, *model.samples[0])
    first = module(*inputs)
    assert model.fingerprint() == before
    with torch.no_grad():
        model.graph.get_parameter("mix.bias").add_(1.0)
    assert not torch.equal(module(*inputs), first)


def test_values_apart_have_nothing_between_them(model: Model) -> None:
    with pytest.raises(ValueError, match="does not depend on"):
        segment(model.graph, named(model, "relu"), named(model, "linear"))


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        y[:, 0] += 1.0
        return x + y


def test_what_is_written_in_place_is_told() -> None:
    model = Model.capture(Written().eval(), (torch.randn(2, 4),))
    first, second = (node for node in calls(model.graph) if op_name(node) == "linear")
    found = overwritten(model.graph)
    assert second in found
    assert first not in found


class Viewed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        before = y.flatten(1)
        y[:, 0].add_(1.0).relu_()
        after = y.flatten(1)
        return before + after


def test_what_is_written_through_another_view_is_told_but_not_what_is_made_afterwards() -> None:
    graph = Model.capture(Viewed().eval(), (torch.randn(2, 3, 4),)).graph
    product, before = (next(node for node in calls(graph) if op_name(node) == name) for name in ("mul", "flatten"))
    after = [node for node in calls(graph) if op_name(node) == "flatten"][-1]
    added = next(node for node in calls(graph) if op_name(node) == "add_")
    found = overwritten(graph)
    assert {product, before, added} <= found  # the rectifier writes over the sum
    assert after not in found
