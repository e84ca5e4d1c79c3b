"""Modules that hold choices, for tests: a convolutional net and a transformer with every kind of choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.spaces import (
    Architecture,
    BatchNorm2d,
    Choice,
    Conv2d,
    DesignedSpace,
    Kernel,
    LayerNorm,
    Linear,
    Repeat,
    Width,
    Zero,
)


class Inverted(nn.Module):
    def __init__(self, width: Any) -> None:
        super().__init__()
        self.expansion, self.kernel = Width([1, 2]), Kernel([3, 5])
        hidden = width * self.expansion
        self.widen = Conv2d(width, hidden, 1, bias=False)
        self.norm = BatchNorm2d(hidden)
        self.filter = Conv2d(hidden, hidden, self.kernel, padding=self.kernel // 2, groups=hidden)
        self.narrow = Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm(self.widen(x)))
        return x + self.narrow(functional.relu(self.filter(y)))  # type: ignore[no-any-return]


class ConvNet(nn.Module):
    """Widths that layers share, operators, depth, kernels; what follows a flatten; a layer of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.width = width = Width([4, 8])
        self.stem = nn.Sequential(Conv2d(1, width, 3, stride=2, padding=1), BatchNorm2d(width), nn.ReLU())
        self.blocks = Repeat(lambda index: self._block(width), least=0, most=2)
        self.grouped = Conv2d(width, 2 * width, 3, padding=1, groups=2)
        self.fixed = nn.Conv2d(1, 4, 1)
        self.norm = LayerNorm(width * 18)
        self.head = Linear(width * 18, 5, bias=False)

    @staticmethod
    def _block(width: Any) -> Choice:
        conv = nn.Sequential(Conv2d(width, width, 3, padding=1), nn.ReLU())
        return Choice({"conv": conv, "inverted": Inverted(width), "skip": nn.Identity(), "none": Zero()})

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.stem(x))
        y = functional.adaptive_avg_pool2d(self.grouped(y), 3) + self.fixed(x).mean()
        return self.head(self.norm(y.flatten(1)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, width: Any, heads: Any) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, heads * 12)
        self.out = Linear(heads * 4, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, int(self.heads), 4).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: Any) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.attention = Attention(width, Width([1, 2, 3]))
        self.hidden = Width([8, 12, 16])
        self.mlp = nn.Sequential(LayerNorm(width), Linear(width, self.hidden), nn.GELU(), Linear(self.hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A width of a residual stream, heads and hidden units of each block, depth."""

    def __init__(self) -> None:
        super().__init__()
        width = Width([8, 12])
        self.embed = Linear(6, width)
        self.blocks = Repeat([Block(width) for _ in range(3)], least=1)
        self.head = Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))  # type: ignore[no-any-return]


def conv_net(seed: int = 0) -> tuple[DesignedSpace, Tensor]:
    """Return a space of convolutional nets whose batch norms have seen data, and images."""
    torch.manual_seed(seed)
    space, x = DesignedSpace(ConvNet()), torch.randn(4, 1, 12, 12)
    for part in space.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = torch.randn(part.num_features)
            part.running_var = 0.5 + torch.rand(part.num_features)
    return space, x


def transformer(seed: int = 0) -> tuple[DesignedSpace, Tensor]:
    """Return a space of transformers, and token vectors."""
    torch.manual_seed(seed)
    return DesignedSpace(Transformer()), torch.randn(4, 5, 6)


def samples(space: DesignedSpace, count: int, seed: int = 0) -> list[Architecture]:
    """Return random architectures."""
    generator = torch.Generator().manual_seed(seed)
    return [space.sample(generator) for _ in range(count)]
