"""Users' own models, each in a folder of its own: capture, int8, export, and the file in the baseline's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from mil_cli.cli.main import main

COMMON = """
import torch
from torch import nn

generator = torch.Generator().manual_seed(0)
"""

CNN_MODEL = """
import torch
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 4),
    )
"""

CNN_DATA = """
def build():
    def split(n):
        images = torch.randn(n, 3, 16, 16, generator=generator)
        return images, images.mean((1, 2, 3)).mul(40).long().remainder(4)
    return {"train": split(128), "val": split(64), "test": split(64)}
"""

UNET_MODEL = """
import torch
from torch import nn

class UNet(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, noisy):
        skip = self.down1(noisy)
        wide = self.up(self.down2(skip))
        return noisy + self.out(torch.cat([skip, wide], dim=1))

def build():
    return UNet()
"""

UNET_DATA = """
def build():
    def split(n):
        clean = torch.nn.functional.avg_pool2d(torch.rand(n, 1, 20, 20, generator=generator), 5, 1)
        return clean + 0.1 * torch.randn(clean.shape, generator=generator), clean
    return {"train": split(96), "val": split(32), "test": split(32)}
"""

TRANSFORMER_MODEL = """
import torch
from torch import nn

class Classifier(nn.Module):
    def __init__(self, vocabulary=50, width=32, classes=3):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens, padding):
        hidden = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        keep = (~padding).unsqueeze(-1).float()
        return {"logits": self.head((hidden * keep).sum(1) / keep.sum(1))}

def build():
    return Classifier()
"""

TRANSFORMER_DATA = """
def build():
    def split(n):
        tokens = torch.randint(0, 50, (n, 12), generator=generator)
        lengths = torch.randint(4, 13, (n, 1), generator=generator)
        padding = torch.arange(12)[None] >= lengths
        labels = tokens.masked_fill(padding, 0).sum(1).remainder(3)
        return {"tokens": tokens, "padding": padding, "labels": labels}
    return {"train": split(128), "val": split(64), "test": split(64)}
"""

RECIPE = """
defaults:
  - /mil/defaults
  - /task: TASK
  - /device: host_cpu
  - /stage/quantize@stages.quantize: static
  - _self_
model: {_target_: model.build CHECKPOINT}
data: {_target_: data.build}
trainer: {epochs: 1, batch_size: 32}
goals: {size: {max_ratio: 1.0}}
measure: {sessions: 1}
chain: [quantize]
"""


def write(folder: Path, *, model: str, data: str, task: str, checkpoint: str = "") -> None:
    (folder / "model.py").write_text(model)
    (folder / "data.py").write_text(COMMON + data)
    (folder / "recipe.yaml").write_text(RECIPE.replace("TASK", task).replace(" CHECKPOINT", checkpoint))


def plain_cnn(folder: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(CNN_MODEL, namespace)
    torch.manual_seed(7)
    module: nn.Module = namespace["build"]()
    wrapped = {"state_dict": {f"module.{name}": value for name, value in module.state_dict().items()}}
    torch.save(wrapped, folder / "trained.pt")
    write(folder, model=CNN_MODEL, data=CNN_DATA, task="classification", checkpoint=", checkpoint: trained.pt")


def unet(folder: Path) -> None:
    write(folder, model=UNET_MODEL, data=UNET_DATA, task="image_to_image")


def transformer(folder: Path) -> None:
    write(folder, model=TRANSFORMER_MODEL, data=TRANSFORMER_DATA, task="classification")


@pytest.mark.parametrize(
    "project", [plain_cnn, *(pytest.param(project, marks=pytest.mark.slow) for project in (unet, transformer))]
)
def test_the_exported_file_takes_the_baselines_place(
    project: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    project(folder)
    monkeypatch.chdir(folder)
    assert main(["compress", "recipe.yaml", "--out", "run"]) == 0
    report = json.loads(Path("run/report.json").read_text())
    before = report["preparation"]
    assert before["family"] == ("given" if project is plain_cnn else "train")  # a checkpoint needs no training
    assert before["measurement"]["quality"]["split"] == "val"
    assert before["measurement"]["macs"] == report["baseline"]["macs"]
    assert report["parity"]["metric_onnx"] == pytest.approx(report["parity"]["metric_torch"], rel=0.05)
    assert report["stages"][0]["notes"]["quantized_layers"] > 0

    def script(name: str) -> tuple[list[Any], list[Any], list[Any]]:
        """What a user has around the baseline's file."""
        session = onnxruntime.InferenceSession(f"run/{name}", providers=["CPUExecutionProvider"])
        generator = np.random.default_rng(0)
        feeds = {}
        for value in session.get_inputs():
            shape = [2 if isinstance(size, str) else size for size in value.shape]
            match value.type:
                case "tensor(float)":
                    # Within the range of every project's training data: beyond it, int8 rightly saturates.
                    feeds[value.name] = generator.uniform(0.3, 0.7, shape).astype(np.float32)
                case "tensor(int64)":
                    feeds[value.name] = generator.integers(0, 50, shape)
                case "tensor(bool)":
                    feeds[value.name] = np.zeros(shape, bool)
        outputs = session.run(None, feeds)
        describe = [(value.name, value.type, value.shape) for value in session.get_inputs()]
        return describe, [(value.name, value.type, value.shape) for value in session.get_outputs()], outputs

    before, after = script("baseline.onnx"), script("model.onnx")
    assert before[:2] == after[:2]
    for was, now in zip(before[2], after[2], strict=True):
        assert was.shape == now.shape
        assert np.abs(was - now).max() < 0.15 * max(1.0, float(np.abs(was).max()))
