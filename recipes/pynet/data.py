"""Photographs, and what a camera's sensor would have seen of them: a noisy mosaic under a Bayer filter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mil_cli.data.photographs import photographs, random_crop
from mil_cli.errors import DataError

_GAMMA = 2.2  # of the photographs' brightness over the light
_GAINS = 2.0, 1.0, 1.6  # by which a camera brightens red, green and blue: sensors see less of red and blue
_PHOTON_NOISE = 0.004  # variance over the light
_READ_NOISE = 0.008  # standard deviation
_FILTER = ((0, 1), (1, 2))  # channel of each place: red and green above green and blue


class Exposures(Dataset[tuple[Tensor, Tensor]]):
    """Exposures drawn anew at each reading, by torch's global generator (which mil seeds for each sample and epoch).

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
        """Return a mosaic in [0, 1] of shape (1, size, size), and the photograph in [0, 1] of shape (3, size, size)."""
        photograph = random_crop(self._images, self._size).float() / 255
        return expose(photograph), photograph


def expose(photograph: Tensor) -> Tensor:
    """Return the readings of a sensor.

    The noise is that of photons and of reading out, both normal (Foi et al. 2008, "Practical Poissonian-Gaussian noise
    modeling and fitting for single-image raw-data").

    Args:
        photograph: In [0, 1], of shape (3, height, width), both even.

    Returns:
        Readings in [0, 1] of shape (1, height, width); the places of the filter repeat every two pixels.
    """
    light = photograph**_GAMMA / torch.tensor(_GAINS)[:, None, None]
    mosaic = light.new_empty(1, *light.shape[1:])
    for row, channels in enumerate(_FILTER):
        for column, channel in enumerate(channels):
            mosaic[0, row::2, column::2] = light[channel, row::2, column::2]
    noise = (_PHOTON_NOISE * mosaic + _READ_NOISE**2).sqrt() * torch.randn(mosaic.shape)
    return (mosaic + noise).clamp(0, 1)


def build(
    root: str | Path | None = None,
    train_samples: int = 4000,
    val_samples: int = 500,
    test_samples: int = 1000,
    size: int = 64,
) -> dict[str, Dataset]:
    """Return the three splits; no photograph is in two of them.

    Args:
        root: A folder with photographs in train, val and test; by default those of the Debian packages.
        train_samples: Exposures of an epoch; each epoch has new ones.
        val_samples: Exposures of val, always the same.
        test_samples: Exposures of test, always the same.
        size: Side of the exposures, in pixels.
    """
    if size % 2:
        raise DataError("the filter repeats every two pixels: give an even number", where="data.size", value=size)
    counts = {"train": train_samples, "val": val_samples, "test": test_samples}
    return {name: Exposures(photographs(name, root=root), samples, size) for name, samples in counts.items()}
