"""What the tests of learned roundings share: a network of residual blocks, its surroundings, and its weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.device.profile import DeviceProfile, Int8Form
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.stages.context import Context
from mil_cli.training.batch_norm import recalibrate
from tests.stages.contexts import make_context


class Net(nn.Module):
    """A stem, a residual block with a norm in it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.first, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 6, 6, generator=generator).cumsum(3)  # neighbours are correlated
    split = TensorSplit((images, torch.randint(4, (64,), generator=generator)))
    return Data(name="walks", train=split, val=split, test=split)


@cache
def make_model() -> Model:
    """Return a model whose norm knows the data; it is shared, so not to be changed."""
    torch.manual_seed(0)
    model = Model.capture(Net().eval(), (torch.randn(2, 1, 6, 6),))
    return recalibrate(model, make_context(data()).calibration(samples=64, batch_size=64))


def context(workspace: Path | None = None, **changes: Any) -> Context:
    form = Int8Form(activations="uint8", reduce_range=False, per_channel=True)
    changes = {"device": DeviceProfile(name="test", int8=form), **changes}
    return make_context(changes.pop("data", None) or data(), name="quantize", workspace=workspace, **changes)


def quick(**changes: Any) -> dict[str, Any]:
    """Return settings that take a moment."""
    settings = {"weight_bits": 3, "first_last_bits": 3, "iterations": 60, "learning_rate": 0.03}
    return {**settings, "samples": 64, "batch_size": 16, "calibration_samples": 64, **changes}


def weights(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by name each quantized weight, and its scale shaped to go with it."""
    found = {}
    for node in calls(model.graph):
        if op_name(node) == "quantize_affine" and get_argument(node, "x").op == "get_attr":
            name = str(get_argument(node, "x").target)
            weight = get_attribute(model.graph, name).detach()
            scale = get_attribute(model.graph, str(get_argument(node, "scale").target))
            found[name] = weight, scale.reshape(-1, *[1] * (weight.ndim - 1))
    return found


def steps(model: Model) -> dict[str, float]:
    """Return by name the scale of each activation."""
    return {
        str(scale.target): float(get_attribute(model.graph, str(scale.target)))
        for node in calls(model.graph)
        if op_name(node) == "quantize_affine" and get_argument(node, "x").op != "get_attr"
        for scale in [get_argument(node, "scale")]
    }
