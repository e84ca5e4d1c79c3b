"""Photographs, and the same at half the resolution."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from mil_cli.data.photographs import photographs, random_crop
from mil_cli.errors import DataError

_DETAIL = 0.1  # standard deviation of a crop's pixels below which it is drawn again: a clear sky has nothing to restore
_TRIES = 20


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Crops drawn anew at each reading, by torch's global generator (which mil seeds for each sample and epoch).

    Args:
        images: Photographs, uint8 of shape (3, height, width).
        samples: Length of the data set.
        size: Side of the crops, in pixels; even.
    """

    def __init__(self, images: list[Tensor], samples: int, size: int) -> None:
        self._images = images
        self._samples = samples
        self._size = size

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return images in [0, 1] of shape (3, size / 2, size / 2) and (3, size, size)."""
        for _ in range(_TRIES):
            photograph = random_crop(self._images, self._size).float() / 255
            if photograph.std() > _DETAIL:
                break
        return halved(photograph), photograph


def halved(photograph: Tensor) -> Tensor:
    """Return a photograph in [0, 1] at half its resolution, by bicubic interpolation, in the 256 levels of a file."""
    small = functional.interpolate(photograph[None], scale_factor=0.5, mode="bicubic", antialias=True)[0]
    return torch.round(255 * small.clamp(0, 1)) / 255


def build(
    root: str | Path | None = None,
    train_samples: int = 2000,
    val_samples: int = 200,
    test_samples: int = 500,
    size: int = 96,
) -> dict[str, Dataset]:
    """Return the three splits; no photograph is in two of them.

    Args:
        root: A folder with photographs in train, val and test; by default those of the Debian packages.
        train_samples: Crops of an epoch; each epoch has new ones.
        val_samples: Crops of val, always the same.
        test_samples: Crops of test, always the same.
        size: Side of the crops, in pixels.
    """
    if size % 2 or size < 2:
        raise DataError("half of it must be a whole number", where="data.size", value=size)
    counts = {"train": train_samples, "val": val_samples, "test": test_samples}
    return {name: Pairs(photographs(name, root=root), samples, size) for name, samples in counts.items()}
