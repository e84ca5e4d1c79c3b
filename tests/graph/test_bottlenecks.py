"""Bottlenecks against the definition: without such a value no path leads from the input to an output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from mil_cli.graph.bottlenecks import bottlenecks
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls
from mil_cli.models.mobilenet import mobilenet
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit


class Dense(nn.Module):
    """Each layer reads all before it; a second output leaves early."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 4)
        self.layers = nn.ModuleList(nn.Linear(4 * (index + 1), 4) for index in range(3))
        self.head, self.early = nn.Linear(16, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [self.stem(x).relu()]
        for layer in self.layers:
            values.append(layer(torch.cat(values, 1)).relu())
        return self.head(torch.cat(values, 1)), self.early(x)


class Masked(nn.Module):
    """A mask beside the input is read by every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        gate = 1 - mask
        for layer in self.layers:
            x = x + layer(x * gate)
        return x


NETS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "resnet": lambda: (resnet20(width=4, blocks=2), (torch.rand(2, 1, 8, 8),)),
    "mobilenet": lambda: (mobilenet(widths=(4, 8), blocks=(1, 2), last=16), (torch.rand(2, 1, 8, 8),)),
    "vit": lambda: (vit(image_size=8, dim=16, depth=2, heads=2), (torch.rand(2, 1, 8, 8),)),
    "dense": lambda: (Dense(), (torch.rand(2, 6),)),
    "masked": lambda: (Masked(), (torch.rand(2, 5), torch.rand(2, 5))),
}


def _tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor | tuple | list)


def _leads_around(model: Model, avoided: Node) -> bool:
    """Whether the first input reaches the first output although a node is taken away."""
    found = {model.graph.graph.find_nodes(op="placeholder")[0]}
    for node in model.graph.graph.nodes:
        if node is not avoided and _tensor(node) and found & set(node.all_input_nodes):
            found.add(node)
    return model.graph.graph.output_node().all_input_nodes[0] in found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "mobilenet" else ()) for name in NETS]
)
def test_they_are_what_no_path_leads_around(name: str) -> None:
    module, args = NETS[name]()
    model = Model.capture(module.eval(), args)
    expected = [node for node in calls(model.graph) if _tensor(node) and not _leads_around(model, node)]
    expected = [node for node in expected if isinstance(node.meta["val"], Tensor)]
    assert bottlenecks(model.graph) == expected
    assert expected


def test_a_dense_net_has_them_where_its_layers_fan_out_and_in() -> None:
    module, args = NETS["dense"]()
    names = [node.name for node in bottlenecks(Model.capture(module, args).graph)]
    assert names == ["linear", "relu", "cat_3", "linear_4"]


def test_a_model_that_ignores_its_input_has_none() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.rand(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.value * 2

    assert bottlenecks(Model.capture(Fixed(), (torch.rand(2, 5),)).graph) == []
