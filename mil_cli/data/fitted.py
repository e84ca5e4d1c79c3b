"""A split whose images are brought to the shape that a model takes: another size, grey for colour, colour for grey."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mil_cli.data.base import Batch, Split
from mil_cli.errors import DataError

_IMAGE_AXES = 4


class FittedImages:
    """A split with all its images brought to one shape; its other entries stay as they are.

    Args:
        split: The split; images are its floating-point tensors of shape (batch, channels, height, width).
        channels: Channels that images get: grey ones are repeated, and the mean of colour ones makes grey.
        size: (height, width) that they are interpolated to; None: their own.
    """

    def __init__(self, split: Split, *, channels: int, size: tuple[int, int] | None) -> None:
        self._split, self._channels, self._size = split, channels, size

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, batch_size: int, **options: Any) -> Iterator[Batch]:
        """Give the batches of one pass; see `Split.batches`.

        Raises:
            DataError: Images have channels that cannot be brought to those asked for.
        """
        for batch in self._split.batches(batch_size, **options):
            if isinstance(batch, Mapping):
                yield {key: self._fit(value) for key, value in batch.items()}
            else:
                yield tuple(self._fit(value) for value in batch)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the split's content and of the shape."""
        facts = f"{self._split.fingerprint()} {self._channels} {self._size}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def _fit(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim != _IMAGE_AXES or not value.is_floating_point():
            return value
        return fit_images(value, channels=self._channels, size=self._size)


def fit_images(images: Tensor, *, channels: int, size: tuple[int, int] | None) -> Tensor:
    """Bring images to a number of channels and a size.

    Args:
        images: Shape (batch, channels, height, width).
        channels: What they get.
        size: (height, width); None: their own.

    Returns:
        Shape (batch, channels, height, width) of what was asked for; the images themselves where that is theirs.

    Raises:
        DataError: The channels are neither one, nor to become one, nor right.
    """
    found = images.shape[1]
    if channels not in (found, 1) and found != 1:
        raise DataError(
            f"images of {found} channels cannot be made images of {channels}",
            where="data",
            hint=f"give images of {channels} channels, or grey ones",
        )
    if size is not None and images.shape[2:] != torch.Size(size):
        images = functional.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
    if channels == found:
        return images
    return images.mean(1, keepdim=True) if channels == 1 else images.expand(-1, channels, -1, -1).contiguous()
