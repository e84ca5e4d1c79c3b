from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.device.profile import DeviceProfile, Int8Form
from mil_cli.events import SilentProgress
from mil_cli.export.onnx import ExportedFile, export_onnx
from mil_cli.graph.model import Model
from mil_cli.stages.quantize.static import StaticConfig, quantize
from mil_cli.training.checkpoint import NullSlot

Inputs = Callable[[int], tuple[Tensor, ...]]


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ResNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(2)
        self.block = Residual(width, 2 * width, 2)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        return self.head(functional.adaptive_avg_pool2d(self.block(x), 1).flatten(1))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.add = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.add else self.layers(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.block = InvertedResidual(16, 16, 1)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.block(self.stem(x)).mean((2, 3))))


class AttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, tokens, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        self.block = AttentionBlock(width, 4)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.block(x))[:, 0])


class Encoder(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        states = self.encoder(self.embedding(tokens), src_key_padding_mask=mask)
        keep = (~mask).unsqueeze(-1).to(states.dtype)
        return {"logits": self.head((states * keep).sum(1) / keep.sum(1)), "states": states}


def images(count: int) -> tuple[Tensor, ...]:
    return (torch.randn(count, 1, 16, 16),)


def sentences(count: int) -> tuple[Tensor, ...]:
    mask = torch.zeros(count, 7, dtype=torch.bool)
    mask[:, 5:] = True
    return torch.randint(0, 50, (count, 7)), mask


BUILDERS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "resnet": (ResNet, images),
    "mobilenet": (MobileNet, images),
    "vit": (VisionTransformer, images),
    "encoder": (Encoder, sentences),
}


class Calibration:
    """What the quantizing stage reads of its context: the device's rules and some inputs."""

    def __init__(self, inputs: Inputs, **rules: Any) -> None:
        form: dict[str, Any] = {"activations": "uint8", "reduce_range": False, **rules}
        self.device = DeviceProfile(name="test", int8=Int8Form(**form))
        self.progress = SilentProgress()
        self.notes: dict[str, object] = {}
        self.data = SimpleNamespace(train=range(2**20))  # as many samples as anybody asks for
        self._inputs = inputs

    def calibration(
        self, *, samples: int, batch_size: int, model: Model
    ) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Any]]]:
        for _ in range(0, samples, batch_size):
            yield self._inputs(batch_size), {}

    def slot(self, name: str) -> NullSlot:
        return NullSlot()

    def note(self, **facts: object) -> None:
        self.notes.update(facts)


@dataclass(frozen=True)
class Case:
    """A small net, captured and exported."""

    module: nn.Module
    inputs: Inputs
    model: Model
    exported: ExportedFile

    def quantize(self, rules: dict[str, Any] | None = None, **settings: Any) -> tuple[Model, dict[str, object]]:
        """Quantize it after training; returns the model and what the stage noted."""
        torch.manual_seed(1)
        context = Calibration(self.inputs, **(rules or {}))
        config = StaticConfig(**{"calibration_samples": 128, "calibration_batch_size": 32, **settings})
        return quantize(self.model, config, context), context.notes  # type: ignore[arg-type]


def prepare(module: nn.Module, inputs: Inputs, path: Path) -> Case:
    """Capture and export a module, its batch-norm statistics moved away from the initial ones."""
    module.train()
    with torch.no_grad():
        for _ in range(10):
            module(*inputs(16))
    model = Model.capture(module.eval(), inputs(2))
    return Case(module, inputs, model, export_onnx(model, path))


@pytest.fixture
def make_case() -> Callable[[nn.Module, Inputs, Path], Case]:
    """Capture and export a module of the test's own."""
    torch.manual_seed(0)
    return prepare


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Make one of the small nets, once; so that tests share it."""
    made: dict[str, Case] = {}
    folder = tmp_path_factory.mktemp("float")

    def builder(name: str) -> Case:
        if name not in made:
            torch.manual_seed(0)
            make, inputs = BUILDERS[name]
            made[name] = prepare(make(), inputs, Path(folder) / f"{name}.onnx")
        return made[name]

    return builder
