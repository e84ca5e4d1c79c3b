"""Three small networks with weights that do not depend on torch's random numbers, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 5
SIDE = 12


class _Block(nn.Module):
    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(before, channels, 1, stride) if stride > 1 else nn.Identity()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


class Residual(nn.Module):
    """A residual network; every rectifier is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(_Block(8, 8, 1), _Block(8, 12, 2))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Plain(nn.Module):
    """A plain network without norms whose rectifiers are modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.hidden = nn.Linear(16, 16)
        self.relu3 = nn.ReLU()
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.pool(self.relu1(self.conv1(x)))))
        return self.head(self.relu3(self.hidden(x.mean((2, 3)))))


class InPlace(Plain):
    """The same function with rectifiers that no hook sees: functions, some of them in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.conv1(x), inplace=True))
        x = torch.relu_(self.conv2(x))
        return self.head(torch.clamp(self.hidden(x.mean((2, 3))), min=0))


class Depthwise(nn.Module):
    """Inverted residuals, as MobileNet has them."""

    def __init__(self) -> None:
        super().__init__()

        def layer(before: int, after: int, size: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)
            return [conv, nn.BatchNorm2d(after)]

        self.stem = nn.Sequential(*layer(3, 8, 3, 2), nn.ReLU6())
        self.first = nn.Sequential(
            *layer(8, 24), nn.ReLU6(), *layer(24, 24, 3, 1, groups=24), nn.ReLU6(inplace=True), *layer(24, 8)
        )
        self.second = nn.Sequential(*layer(8, 32), nn.ReLU6(), *layer(32, 32, 3, 2, groups=32), nn.ReLU6())
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        return self.head(self.second(x).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {"residual": Residual, "plain": Plain, "depthwise": Depthwise}


def made(net: Callable[[], nn.Module]) -> Any:
    """Return a network in training mode whose weights come from NumPy's frozen generator, scaled as He et al. do."""
    generator = np.random.RandomState(0)
    module = net()
    for name, parameter in module.named_parameters():
        drawn = torch.from_numpy(generator.standard_normal(tuple(parameter.shape))).float()
        if parameter.ndim > 1:
            parameter.data = drawn * (2 / parameter[0].numel()) ** 0.5
        else:
            parameter.data = drawn / 10 + (0 if name.endswith("bias") else 1)
    return module.train()


def batches(count: int = 2, samples: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Return batches of images and labels from NumPy's frozen generator."""
    generator = np.random.RandomState(1)
    return [
        (
            torch.from_numpy(generator.standard_normal((samples, 3, SIDE, SIDE))).float(),
            torch.from_numpy(generator.randint(0, CLASSES, samples)).long(),
        )
        for _ in range(count)
    ]
