"""Values are shown as they are made, and nothing is computed after the last of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, op_name
from mil_cli.graph.watch import watched


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        return {"y": self.second(torch.relu(self.first(x)) * scale)}


def test_a_graph_ends_with_the_last_value_that_is_shown() -> None:
    module = Net().eval()
    x, scale = torch.randn(5, 3), torch.randn(4)
    model = Model.capture(module, (x,), {"scale": scale})
    relu = next(node for node in calls(model.graph) if op_name(node) == "relu")
    (first,) = [node for node in model.graph.graph.find_nodes(op="placeholder") if "x" in node.name]
    seen: list[Tensor] = []
    runner = watched(model.graph, {relu: seen.append, first: seen.append})
    assert runner(x, scale=scale) == ()
    assert torch.equal(seen[0], x)
    torch.testing.assert_close(seen[1], torch.relu(module.first(x)))
    assert {op_name(node) for node in calls(runner)} == {"linear", "relu"}
    assert {op_name(node) for node in calls(model.graph)} == {"linear", "relu", "mul"}
    torch.testing.assert_close(model(x, scale=scale), module(x, scale=scale))
