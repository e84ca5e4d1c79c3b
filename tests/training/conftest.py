"""A tiny model with batch norm and dropout, and data that it learns in a moment."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mil_cli.data.augment import Augment
from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.graph.model import Model
from mil_cli.task.classification import Classification


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(4 * 9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = nn.functional.max_pool2d(x, 2).flatten(1)
        return self.head(self.dropout(x))  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def tiny() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Tiny()
    return Model.capture(module, (torch.zeros(4, 1, 6, 6),))


@pytest.fixture(scope="session")
def patterns() -> Data:
    """Three classes: bright rows at the top, the middle, the bottom."""
    generator = torch.Generator().manual_seed(0)

    def split(samples: int, augment: Augment | None = None) -> TensorSplit:
        labels = torch.randint(0, 3, (samples,), generator=generator)
        images = torch.randn(samples, 1, 6, 6, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[0, 2 * label : 2 * label + 2] += 1.5
        return TensorSplit((images, labels), augment=augment)

    return Data(name="patterns", train=split(70, Augment(flip=True, crop_padding=1)), val=split(40), test=split(40))


@pytest.fixture(scope="session")
def task() -> Classification:
    return Classification()
