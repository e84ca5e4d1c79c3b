"""The axis of channels, in nets of every layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.graph.channels import channel_axis
from mil_cli.graph.model import Model
from mil_cli.graph.taps import module_output


class ChannelsLast(nn.Module):
    """Maps become (batch, height, width, channels) for a norm and a perceptron, and go back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.up, self.act, self.drop, self.down = nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.down(self.drop(self.act(self.up(self.norm(x.permute(0, 2, 3, 1))))))
        x = functional.relu(self.conv(x + y.permute(0, 3, 1, 2)))
        return self.head(x.mean((2, 3)))


def test_it_is_told_by_the_nearest_layer() -> None:
    # As many rows as channels: no size tells them apart.
    model = Model.capture(ChannelsLast(), (torch.rand(2, 1, 8, 8),))
    axes = {path: channel_axis(module_output(model, path)) for path in ("embed", "norm", "act", "drop", "conv")}
    assert axes == {"embed": 1, "norm": 3, "act": 3, "drop": 3, "conv": 1}


@pytest.mark.parametrize(
    ("layers", "shape", "path", "axis"),
    [
        ([nn.Conv1d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 4, 1)], (2, 6, 6), "1", 1),
        ([nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)], (2, 6, 6), "1", 2),
        ([nn.ConstantPad1d(2, 0.0), nn.Tanh(), nn.Conv1d(6, 6, 3)], (2, 6, 6), "0", 1),
        ([nn.Tanh(), nn.Sigmoid()], (2, 6, 6), "0", 2),
        ([nn.Tanh(), nn.Sigmoid()], (2, 6, 6, 6), "0", 1),
        ([nn.Linear(6, 6), nn.ReLU()], (2, 6), "1", 1),
        ([nn.ReLU(), nn.AvgPool2d(2)], (2, 6, 6, 6), "0", 1),
        ([nn.Conv3d(2, 3, 1), nn.ReLU()], (2, 2, 3, 3, 3), "1", 1),
        ([nn.Tanh(), nn.LayerNorm((6, 6))], (2, 6, 6), "0", 2),
    ],
)
def test_layouts(layers: list[nn.Module], shape: tuple[int, ...], path: str, axis: int) -> None:
    model = Model.capture(nn.Sequential(*layers), (torch.rand(*shape),))
    assert channel_axis(module_output(model, path)) == axis


def test_a_value_for_each_sample_has_none() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Flatten(0)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.sum(1)).tanh()

    model = Model.capture(Sums(), (torch.rand(3, 5),))
    assert channel_axis(next(node for node in model.graph.graph.nodes if node.name == "tanh")) is None
