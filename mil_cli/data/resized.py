"""A split whose images are made smaller as they come, for trainings that are to be cheap."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional

from mil_cli.data.base import Batch, Split


class Resized:
    """A split of which every image has another height and width; how many samples there are stays.

    Args:
        split: Where batches come from.
        share: Of height and width, above 0 and at most 1.
    """

    def __init__(self, split: Split, share: float) -> None:
        self._split, self._share = split, share

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, batch_size: int, **options: Any) -> Iterator[Batch]:
        """Give the batches of one pass; see `Split.batches`."""
        return (resized(batch, self._share) for batch in self._split.batches(batch_size, **options))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the split's fingerprint and the share."""
        return hashlib.sha256(f"{self._split.fingerprint()} resized to {self._share}".encode()).hexdigest()


def resized(batch: Batch, share: float) -> Batch:
    """Return a batch whose images have a share of their height and width; all else in it stays.

    Each new pixel is the mean of the area that it covers, so that no detail turns into another pattern.

    Args:
        batch: Its images are those entries of floating-point type and shape (samples, channels, height, width).
        share: Of height and width, above 0 and at most 1; sizes are rounded, to one at least.
    """

    def smaller(value: Any) -> Any:
        if not is_image(value):
            return value
        size = [max(1, round(share * side)) for side in value.shape[2:]]
        return functional.interpolate(value, size=size, mode="area")

    if isinstance(batch, Mapping):
        return {name: smaller(value) for name, value in batch.items()}
    return tuple(smaller(value) for value in batch)


def is_image(value: Any) -> bool:
    """Whether a value is a batch of images: floating-point numbers (samples, channels, height, width)."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 4
