"""Networks of real size in plain torch: ResNet-50, ViT-B/16, and a graph of 2,500 nodes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _norm_conv(inputs: int, outputs: int, window: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, window, stride, window // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = _norm_conv(inputs, width, 1)
        self.second = _norm_conv(width, width, 3, stride)
        self.third = _norm_conv(width, 4 * width, 1)
        same = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if same else _norm_conv(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(F.relu(self.first(x), inplace=True)), inplace=True)
        return F.relu(self.third(y) + self.shortcut(x), inplace=True)


def resnet50(classes: int = 1000) -> nn.Module:
    """He et al. 2016, "Deep Residual Learning for Image Recognition"; images of 224 x 224."""
    layers: list[nn.Module] = [_norm_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)):
        for block in range(depth):
            layers.append(_Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.project(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _VisionTransformer(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 197, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_b16() -> nn.Module:
    """Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; images of 224 x 224."""
    return _VisionTransformer(768, 12, 12, 1000)


class _Mixed(nn.Module):
    """Split, depthwise and grouped convolution, gate, channel shuffle, and attention over space, in one block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.expand, self.deep = _norm_conv(half, half, 1), _norm_conv(half, half, 3, groups=half)
        self.grouped = _norm_conv(width, width, 3, groups=4)
        self.down, self.up = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)
        self.qkv, self.project = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        y = torch.cat([left, F.relu(self.deep(F.relu(self.expand(right))))], 1)
        n, c, h, w = y.shape
        y = F.relu(self.grouped(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))
        y = y * torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        q, k, v = self.qkv(y).view(n, 3, 4, c // 4, h * w).transpose(-1, -2).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(n, c, h, w)
        return x + self.project(y)


def mixed(depth: int = 42, width: int = 64) -> nn.Module:
    """A deep graph of all kinds of structure, about 40 nodes a block; images of 16 x 16."""
    blocks = (_Mixed(width) for _ in range(depth))
    return nn.Sequential(_norm_conv(3, width, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
