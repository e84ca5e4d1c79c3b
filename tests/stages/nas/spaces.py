"""A small space for the 8x8 images of digits, and a context in which a stage meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mil_cli.data.digits import digits
from mil_cli.events import Progress
from mil_cli.graph.model import Model
from mil_cli.spaces import BatchNorm2d, Choice, Conv2d, DesignedSpace, Linear, Repeat, Width
from mil_cli.stages.context import Context
from mil_cli.training.config import TrainerConfig
from tests.stages.contexts import make_context


class DigitNet(nn.Module):
    """Widths, operators and a depth to choose from."""

    def __init__(self) -> None:
        super().__init__()
        width = Width([4, 8, 12, 16])
        self.stem = nn.Sequential(Conv2d(1, width, 3, stride=2, padding=1), BatchNorm2d(width), nn.ReLU())
        self.blocks = Repeat([self._block(width) for _ in range(3)], least=0)
        self.head = Linear(width, 10)

    @staticmethod
    def _block(width: Width) -> Choice:
        conv = nn.Sequential(Conv2d(width, width, 3, padding=1, bias=False), BatchNorm2d(width), nn.ReLU())
        narrow = nn.Sequential(Conv2d(width, width, 1), nn.ReLU())
        return Choice({"conv": conv, "narrow": narrow, "skip": nn.Identity()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(functional.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))  # type: ignore[no-any-return]


def digit_space() -> DesignedSpace:
    torch.manual_seed(0)
    return DesignedSpace(DigitNet())


def build(architecture: Any) -> Model:
    return Model.capture(digit_space().build(architecture).eval(), (torch.zeros(2, 1, 8, 8),))


def space_context(workspace: Path | None = None, progress: Progress | None = None, **changes: Any) -> Context:
    around: dict[str, Any] = {
        "trainer": TrainerConfig(epochs=1, learning_rate=0.1, checkpoint_every_seconds=0),
        "load_space": digit_space,
        "space_fingerprint": lambda: "digit space",
        **changes,
    }
    return make_context(digits(), name="nas", workspace=workspace, progress=progress, **around)
