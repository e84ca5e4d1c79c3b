"""Garments of Fashion-MNIST in random colours, places and sizes before real photographs; a class for every pixel."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from mil_cli.data.fashion_mnist import fashion_mnist
from mil_cli.data.photographs import photographs, random_crop

_SIDES = 22, 40  # of a garment, in pixels
_MOST_GARMENTS = 3
_INSIDE = 0.1  # grey value from which a pixel belongs to the garment


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Scenes drawn anew at each reading, by torch's global generator (which mil seeds for each sample and epoch).

    Args:
        backgrounds: Photographs, uint8 of shape (3, height, width).
        garments: Grey values in [0, 1] of shape (garments, 28, 28).
        kinds: Their classes, 0 to 9, of shape (garments,).
        samples: Length of the data set.
        size: Side of the scenes, in pixels.
    """

    def __init__(self, backgrounds: list[Tensor], garments: Tensor, kinds: Tensor, samples: int, size: int) -> None:
        self._backgrounds = backgrounds
        self._garments = garments
        self._kinds = kinds
        self._samples = samples
        self._size = size

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image in [-1, 1] of shape (3, size, size), and labels: 0 for the background, else 1 + the kind."""
        image = random_crop(self._backgrounds, self._size).float() / 255
        labels = torch.zeros(self._size, self._size, dtype=torch.long)
        for _ in range(int(torch.randint(1, _MOST_GARMENTS + 1, ()))):
            self._put(image, labels)
        return 2 * image - 1, labels

    def _put(self, image: Tensor, labels: Tensor) -> None:
        """Put a garment over what is there, in place."""
        chosen = int(torch.randint(len(self._kinds), ()))
        side = int(torch.randint(_SIDES[0], _SIDES[1] + 1, ()))
        top, left = torch.randint(self._size - side + 1, (2,)).tolist()
        garment = self._garments[chosen]
        if float(torch.rand(())) < 0.5:
            garment = garment.flip(-1)
        grey = functional.interpolate(garment[None, None], size=(side, side), mode="bilinear", align_corners=False)[0]
        inside = grey > _INSIDE
        rows, columns = slice(top, top + side), slice(left, left + side)
        colour = 0.25 + 0.75 * torch.rand(3, 1, 1)
        image[:, rows, columns] = torch.where(inside, grey * colour, image[:, rows, columns])
        labels[rows, columns] = torch.where(inside[0], self._kinds[chosen] + 1, labels[rows, columns])


def build(
    root: str | Path | None = None,
    folder: str | Path | None = None,
    train_samples: int = 4000,
    val_samples: int = 1000,
    test_samples: int = 2000,
    size: int = 64,
) -> dict[str, Dataset]:
    """Return the three splits; neither photographs nor garments are in two of them.

    Args:
        root: A folder with photographs in train, val and test; by default those of the Debian packages.
        folder: The folder of Fashion-MNIST's IDX files; by default where Debian's package puts them.
        train_samples: Scenes of an epoch; each epoch has new ones.
        val_samples: Scenes of val, always the same.
        test_samples: Scenes of test, always the same.
        size: Side of the scenes, in pixels.
    """
    clothes = fashion_mnist(root=folder, crop_padding=0, flip=False)
    counts = {"train": train_samples, "val": val_samples, "test": test_samples}
    splits: dict[str, Dataset] = {}
    for name, samples in counts.items():
        split = getattr(clothes, name)
        images, kinds = next(iter(split.batches(len(split))))
        low, high = images.min(), images.max()  # normalised: black and white
        splits[name] = Scenes(photographs(name, root=root), ((images - low) / (high - low))[:, 0], kinds, samples, size)
    return splits
