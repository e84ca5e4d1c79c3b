"""What is rounded together: each layer once, blocks as they are drawn in the papers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.functional import make_functional
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import op_name
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit
from mil_cli.stages.quantize.placement import place_any
from mil_cli.stages.quantize.units import Unit, block_units, layer_units


def placed(module: nn.Module, shape: tuple[int, ...]) -> tuple[Model, list[Unit], list[Unit]]:
    torch.manual_seed(0)
    model = fold_batch_norm(Model.capture(module.eval(), (torch.randn(2, *shape),)))
    make_functional(model.graph)
    layers = place_any(model.graph, policy="auto").layers
    single, blocks = layer_units(model.graph, layers), block_units(model.graph, layers)
    assert [unit.layers for unit in single] == [(layer.name,) for layer in layers]
    assert sorted(name for unit in blocks for name in unit.layers) == sorted(layer.name for layer in layers)
    return model, single, blocks


def kind(model: Model, name: str) -> str:
    return next(op_name(node) for node in model.graph.graph.nodes if node.name == name)


def test_a_residual_network_has_its_blocks_with_shortcut_and_rectifier() -> None:
    model, single, blocks = placed(resnet20(width=8, blocks=2), (1, 8, 8))
    assert [len(unit.layers) for unit in blocks] == [1, 2, 2, 3, 2, 3, 2, 1]
    assert {name.rpartition(".")[0] for name in blocks[1].layers} == {"stages.0.0"}
    assert [kind(model, unit.end) for unit in blocks[:-1]] == ["relu"] * 7
    assert [unit.entry for unit in blocks[1:-1]] == [unit.end for unit in blocks[:-2]]
    assert [unit.channels for unit in blocks] == [8, 8, 8, 16, 16, 32, 32, 10]
    assert {kind(model, unit.end) for unit in single} == {"relu", "conv2d", "linear"}


def test_a_transformer_has_attention_and_perceptron() -> None:
    model, _, blocks = placed(vit(image_size=8, patch=4, dim=16, depth=2, heads=2), (1, 8, 8))
    inside = [unit for unit in blocks if len(unit.layers) > 1]
    assert len(inside) == 4
    assert all(kind(model, unit.end) == "add" for unit in inside)


class Written(nn.Module):
    """A block inside which a value is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.first(x)
        y[:, 0] += 1.0
        logits: Tensor = self.head(x + self.second(y))
        return logits


def test_where_values_are_overwritten_layers_stand_alone() -> None:
    _, single, blocks = placed(Written(), (4,))
    assert blocks == single
