"""A small residual network, trained for a moment on digits, for tests of what searches its structure."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mil_cli.data.digits import digits
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.registry import config_type
from tests.stages.contexts import make_context

DATA = digits()


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.second = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


class Blocks(nn.Module):
    """A stream of 6 channels, and blocks of 4, 8 and 6 inner ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, stride=2)
        self.blocks = nn.ModuleList(Block(6, inner) for inner in (4, 8, 6))
        self.out = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean((2, 3)))


def module() -> Blocks:
    torch.manual_seed(0)
    return Blocks().eval()


@cache
def trained() -> Model:
    """Return a model that knows the digits a little; it is shared, so not to be changed."""
    model = Model.capture(module(), (torch.randn(2, 1, 8, 8),))
    return make_context(DATA).finetune(model, stage=None, name="all", trainer={"epochs": 8, "learning_rate": 0.2})


def context(folder: Path | None = None, **changes: Any) -> Context:
    stages = {"recover": config_type("train", "supervised").model_validate({"trainer": {"epochs": 1}})}
    return make_context(DATA, name="prune", workspace=folder, **{"stages": stages, **changes})


def settings(**changes: Any) -> Mapping[str, Any]:
    return {"round_to": 1, "check_samples": 8, "recalibrate_samples": 64, "search_samples": 128, **changes}
