"""A small project that compresses in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """\
defaults:
  - /mil/defaults
  - /task: classification
  - /device: host_cpu
  - /stage/prune@stages.prune: magnitude
  - /stage/distill@stages.recover: soft_labels
  - /stage/quantize@stages.quantize: static
  - _self_
model: {_target_: model.build}
data: {_target_: data.build}
baseline: null
goals: {size: {max_ratio: 9}}
stages:
  prune: {macs: 0.5}
chain: [quantize]
trainer: {epochs: 1, batch_size: 16}
measure: {sessions: 1}
"""

MODEL = """\
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.head = nn.Linear(width, 10)

    def forward(self, image):
        return self.head(self.conv(image).relu().mean((2, 3)))

def build(width=8):
    return Net(width)
"""

DATA = """\
import torch

def build():
    g = torch.Generator().manual_seed(0)
    def split(n):
        return torch.randn(n, 1, 8, 8, generator=g), torch.randint(0, 10, (n,), generator=g)
    return {"train": split(64), "val": split(32), "test": split(32)}
"""

Change = tuple[str, str]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a small project that works, with changes (old, new) to its files, and go into its folder."""

    def write(recipe: Change | None = None, model: Change | None = None, data: Change | None = None) -> Path:
        folder = tmp_path / "project"
        folder.mkdir(exist_ok=True)
        for name, text, change in (
            ("recipe.yaml", RECIPE, recipe),
            ("model.py", MODEL, model),
            ("data.py", DATA, data),
        ):
            if change is not None:
                assert change[0] in text
                text = text.replace(*change)
            (folder / name).write_text(text, encoding="utf-8")
        monkeypatch.chdir(folder)
        return folder

    return write
