"""Images in folders: ``root/<split>/<class>/*`` or ``root/<class>/*``, decoded by Pillow."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from mil_cli.data.base import Data
from mil_cli.data.datasets import DatasetSplit
from mil_cli.data.images import SUFFIXES, images_below, need_pillow, read_image
from mil_cli.errors import DataError

_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_SPLIT_SEED = 0
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_folder(
    *,
    root: str | Path,
    size: int = 224,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    random_crop: bool = True,
    flip: bool = True,
    num_workers: int = 0,
) -> Data:
    """Load a folder of images; a class is a folder, and its index its place in alphabetical order.

    With the folders train, val and test (or any of the last two missing) those are the splits; what is missing is drawn
    from train by a fixed seed. Without them everything is split at random by a fixed seed. Val and test images are
    scaled so that the shorter side fits and cut in the middle.

    Args:
        root: The folder.
        size: Side of the square images that the model gets, in pixels.
        channels: 3 for colour, 1 for grey.
        mean: Mean of each channel, of values in [0, 1]; by default ImageNet's, or 0.5 for grey.
        std: Standard deviation of each channel; as `mean`.
        val_fraction: Share of the images that make val where there is no such folder.
        test_fraction: Share that makes test where there is no such folder.
        random_crop: Whether training images are cut at a random scale (at least half the area) and place.
        flip: Whether training images are mirrored at random.
        num_workers: Loader processes.

    Returns:
        Splits with batches ``(images, labels)``: float32 of shape (batch, channels, size, size), and int64.

    Raises:
        DataError: The folder is missing or holds no classes, the splits' classes differ, or a setting is out of range.
    """
    need_pillow("image folders")
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(
            "the image folder is missing",
            where="data.root",
            value=str(folder),
            hint="set data.root to an existing folder",
        )
    if channels not in (1, 3):
        raise DataError("must be 1 (grey) or 3 (colour)", where="data.channels", value=channels)
    if size < 1:
        raise DataError("must be at least 1 pixel", where="data.size", value=size)
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < fraction < 1:
            raise DataError("must be between 0 and 1", where=f"data.{name}", value=fraction)
    classes, files = _find_splits(folder, {"val": val_fraction, "test": test_fraction})
    default_mean, default_std = ((0.5,), (0.5,)) if channels == 1 else (_IMAGENET_MEAN, _IMAGENET_STD)
    statistics = (tuple(mean) if mean is not None else default_mean, tuple(std) if std is not None else default_std)
    for name, values in zip(("mean", "std"), statistics, strict=True):
        if len(values) != channels:
            raise DataError(f"needs {channels} numbers, one per channel", where=f"data.{name}", value=list(values))
    if any(value <= 0 for value in statistics[1]):
        raise DataError("must be above 0 for each channel", where="data.std", value=list(statistics[1]))

    def view(name: str, *, augment: bool) -> ImageFiles:
        return ImageFiles(
            files[name],
            root=folder,
            size=size,
            channels=channels,
            mean=statistics[0],
            std=statistics[1],
            random_crop=augment and random_crop,
            flip=augment and flip,
        )

    return Data(
        name=f"{folder.name} ({len(classes)} classes)",
        train=DatasetSplit(
            view("train", augment=True), plain=view("train", augment=False), num_workers=num_workers, where="data.train"
        ),
        val=DatasetSplit(view("val", augment=False), num_workers=num_workers, where="data.val"),
        test=DatasetSplit(view("test", augment=False), num_workers=num_workers, where="data.test"),
    )


class ImageFiles(Dataset[tuple[torch.Tensor, int]]):
    """Image files with their class indices; see `image_folder` for the settings."""

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        *,
        root: Path,
        size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        random_crop: bool,
        flip: bool,
    ) -> None:
        self._files = list(files)
        self._root = root
        self._size = size
        self._mode = "L" if channels == 1 else "RGB"
        self._mean = torch.tensor(list(mean), dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(list(std), dtype=torch.float32).view(-1, 1, 1)
        self._random_crop = random_crop
        self._flip = flip

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Decode one image: float32 of shape (channels, size, size), and its class index."""
        from PIL import Image

        path, label = self._files[index]
        image = read_image(path, self._mode)
        square = image.resize((self._size, self._size), Image.Resampling.BILINEAR, box=self._box(*image.size))
        pixels = torch.from_numpy(np.asarray(square, dtype=np.float32).copy() / 255.0)
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        if self._flip and float(torch.rand(())) < 0.5:
            pixels = pixels.flip(-1)
        return ((pixels - self._mean) / self._std).contiguous(), label

    def fingerprint(self) -> str:
        """Return the SHA-256 over names, sizes and times of change of the files, and the settings."""
        digest = hashlib.sha256()
        settings = (self._size, self._mode, self._mean.tolist(), self._std.tolist(), self._random_crop, self._flip)
        digest.update(repr(settings).encode())
        for path, label in self._files:
            facts = path.stat()
            digest.update(
                f"{path.relative_to(self._root).as_posix()}\0{label}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode()
            )
        return digest.hexdigest()

    def _box(self, width: int, height: int) -> tuple[float, float, float, float]:
        side = float(min(width, height))
        left, top = (width - side) / 2, (height - side) / 2
        if self._random_crop:
            scale, x, y = torch.rand(3).tolist()
            side *= (0.5 + 0.5 * scale) ** 0.5
            left, top = x * (width - side), y * (height - side)
        return left, top, left + side, top + side


def _find_splits(folder: Path, fractions: dict[str, float]) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    given = {
        name: next((folder / alias for alias in aliases if (folder / alias).is_dir()), None)
        for name, aliases in _SPLITS.items()
    }
    train_folder = given["train"] or folder
    if given["train"] is None and (given["val"] or given["test"]):
        raise DataError(
            "there is a folder for val or test but none for train",
            where="data.root",
            value=str(folder),
            hint="name the folder of training images 'train'",
        )
    classes = sorted(path.name for path in train_folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise DataError(
            "no class folders",
            where="data.root",
            value=str(train_folder),
            hint="lay the images out as <class>/<image>.png",
        )
    files: dict[str, list[tuple[Path, int]]] = {"train": _list_images(train_folder, classes)}
    if not files["train"]:
        raise DataError(
            f"no images ({', '.join(sorted(SUFFIXES))})",
            where="data.root",
            value=str(train_folder),
            hint="lay the images out as <class>/<image>.png",
        )
    total = len(files["train"])
    for name in ("val", "test"):
        if (split_folder := given[name]) is not None:
            strange = sorted(path.name for path in split_folder.iterdir() if path.is_dir() and path.name not in classes)
            if strange:
                raise DataError(
                    f"{name} has classes that train lacks: {', '.join(strange[:5])}",
                    where="data.root",
                    value=str(split_folder),
                    hint="every split needs the same class folders",
                )
            files[name] = _list_images(split_folder, classes)
            continue
        count = max(1, round(fractions[name] * total))
        order = torch.randperm(len(files["train"]), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
        drawn = set(order[:count])
        files[name] = [file for index, file in enumerate(files["train"]) if index in drawn]
        files["train"] = [file for index, file in enumerate(files["train"]) if index not in drawn]
    return classes, files


def _list_images(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    return [(path, label) for label, name in enumerate(classes) for path in images_below(folder / name)]
