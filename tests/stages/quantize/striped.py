"""Small nets, images of stripes to train them on, and what tests of quantization look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.base import Data, Split
from mil_cli.data.tensors import TensorSplit
from mil_cli.device.profile import DeviceProfile, Int8Form
from mil_cli.events import SilentProgress
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit
from mil_cli.stages.context import Context
from mil_cli.stages.surroundings import Surroundings
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from mil_cli.training.evaluate import evaluate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


class SmoothNet(nn.Module):
    """The same with values that go a little below 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.GELU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.last(self.body(self.stem(x))).mean((2, 3)))
        return logits


def stripes(samples: int, seed: int) -> TensorSplit:
    """Images of three kinds: horizontal stripes, vertical stripes, a chequerboard; with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (samples,), generator=generator)
    line = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(2)
    kinds = torch.stack([line[:, None].expand(8, 8), line[None].expand(8, 8), line[:, None] * line[None]])
    return TensorSplit((kinds[labels][:, None] + torch.randn(samples, 1, 8, 8, generator=generator), labels))


def images(split: Split) -> Tensor:
    return torch.cat([batch[0] for batch in split.batches(64)])  # type: ignore[index]


def around(data: Data, original: Model | None = None, **changes: Any) -> Surroundings:
    class Stored:
        fingerprint = "original"

        def load(self) -> Model:
            assert original is not None
            return original

    settings: dict[str, Any] = {
        "seed": 0,
        "task": Classification(),
        "data": data,
        "device": DeviceProfile(name="test", int8=Int8Form(activations="uint8", reduce_range=False)),
        "trainer": TrainerConfig(epochs=2, batch_size=64, learning_rate=0.02, channels_last=False),
        "goals": {},
        "stages": {},
        "load_source": lambda source: pytest.fail("no source is needed"),
        "source_fingerprint": str,
        "original": Stored(),
    }
    return Surroundings(**{**settings, **changes})


def context(data: Data, original: Model | None = None, workspace: Path | None = None, **changes: Any) -> Context:
    surroundings = around(data, original, **changes)
    return Context(name="quantize", surroundings=surroundings, progress=SilentProgress(), workspace=workspace)


def accuracy(model: Model, data: Data) -> float:
    return evaluate(model, task=Classification(), split=data.val, split_name="val").value


def loss(model: Model, data: Data) -> float:
    labels = torch.cat([batch[1] for batch in data.val.batches(64)])  # type: ignore[index]
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images(data.val)), labels))


def quantizers(model: Model) -> list[Any]:
    return [node for node in calls(model.graph) if op_name(node) == "quantize_affine"]


def scales(model: Model) -> dict[str, Tensor]:
    names = {str(get_argument(node, "scale").target) for node in quantizers(model)}
    return {name: get_attribute(model.graph, name) for name in names}


def codes(model: Model) -> dict[str, Tensor]:
    found = {}
    for node in quantizers(model):
        if node.args[0].op == "get_attr":
            x, scale = (get_attribute(model.graph, str(source.target)).detach() for source in node.args[:2])
            shape = [1] * x.ndim
            shape[0] = -1
            found[str(node.args[0].target)] = (x / scale.reshape(shape)).round().clamp(*node.args[4:]).int()
    return found


def small_resnet() -> nn.Module:
    return resnet20(num_classes=3, widths=(8, 16), blocks=1)


def small_vit() -> nn.Module:
    return vit(num_classes=3, image_size=8, patch=4, dim=16, depth=1, heads=2)


def small_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)
    )
