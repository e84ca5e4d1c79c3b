"""A small network that makes inputs of a model out of noise, and the bank that keeps what it made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

_SMALLEST = 8
_MOST_WIDE = 8
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MOST_AXES = max(_NORMS)
"""Axes behind the channels that inputs may have."""


class Generator(nn.Module):
    """Makes inputs of one shape out of noise and a class: a linear layer, then doublings of the resolution.

    Args:
        shape: Of one input: (channels, ...) with at most three axes behind the channels.
        classes: Number of classes that it is told; 0: it is told none.
        noise: Numbers of noise per sample.
        width: Channels of the last hidden layer.
        span: (low, high): outputs lie strictly between; None: every channel of a batch has mean 0 and variance 1.
    """

    def __init__(
        self, shape: Sequence[int], *, classes: int, noise: int, width: int, span: tuple[float, float] | None
    ) -> None:
        super().__init__()
        channels, *sizes = shape
        self.noise, self.classes = noise, classes
        self._span = span
        axes = len(sizes)
        doublings = max(1, math.ceil(math.log2(max(sizes) / _SMALLEST))) if sizes else 0
        self._sizes = [[-(-size // 2**left) for size in sizes] for left in range(doublings, -1, -1)]
        widths = [width * min(2**left, _MOST_WIDE) for left in range(doublings, -1, -1)]
        self._start_shape = (widths[0], *self._sizes[0])
        self.start = nn.Linear(noise + classes, math.prod(self._start_shape))
        self.norms = nn.ModuleList(_NORMS[axes](count) for count in widths)
        self.layers = nn.ModuleList(
            _CONVOLUTIONS[axes](before, after, 3, padding=1, bias=False) for before, after in pairwise(widths)
        )
        self.end: nn.Module = (
            _CONVOLUTIONS[axes](widths[-1], channels, 3, padding=1) if axes else nn.Linear(widths[-1], channels)
        )
        self.standard = _NORMS[axes](channels, affine=False)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Make inputs.

        Args:
            noise: Shape (batch, noise).
            labels: Class indices of shape (batch,), int64; ignored where the generator is told no class.

        Returns:
            Shape (batch, channels, ...).
        """
        if self.classes:
            noise = torch.cat([noise, functional.one_hot(labels, self.classes).to(noise.dtype)], 1)
        value = functional.leaky_relu(self.norms[0](self.start(noise).unflatten(1, self._start_shape)), 0.2)
        for layer, norm, size in zip(self.layers, list(self.norms)[1:], self._sizes[1:], strict=True):
            value = functional.leaky_relu(norm(layer(functional.interpolate(value, size=size))), 0.2)
        value = self.end(value)
        if self._span is None:
            return self.standard(value)  # type: ignore[no-any-return]
        low, high = self._span
        return low + (high - low) * torch.sigmoid(value)


class Bank(nn.Module):
    """The inputs that were made last, up to a bound.

    Args:
        shape: Of one input.
        capacity: How many are kept.
    """

    images: Tensor
    made: Tensor

    def __init__(self, shape: Sequence[int], *, capacity: int) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(capacity, *shape))
        self.register_buffer("made", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(int(self.made), len(self.images))

    def add(self, images: Tensor) -> None:
        """Keep inputs of shape (batch, ...) in the place of the oldest ones."""
        made, capacity = int(self.made) + len(images), len(self.images)
        last = images[-capacity:]
        self.images[torch.arange(made - len(last), made) % capacity] = last.detach().to(self.images)
        self.made += len(images)

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Return so many of the inputs, drawn with replacement, on the CPU."""
        chosen = torch.randint(len(self), (samples,), generator=generator)
        return self.images[chosen.to(self.images.device)].cpu()
