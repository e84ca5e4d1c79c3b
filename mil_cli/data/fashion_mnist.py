"""Fashion-MNIST: 28x28 grey images of ten kinds of clothing, read from its IDX files."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch

from mil_cli.data.augment import Augment
from mil_cli.data.base import Data
from mil_cli.data.tensors import Normalise, TensorSplit
from mil_cli.errors import DataError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_SPLIT_SEED = 0
_VAL_SAMPLES = 10_000
_MEAN, _STD = 72.94, 90.02  # of the training images, in the units of the stored bytes
_HINT = "apt-get install dataset-fashion-mnist, or set data.root to a folder that holds its four IDX .gz files"


def fashion_mnist(
    *,
    root: str | Path | None = None,
    train_samples: int | None = None,
    crop_padding: int = 2,
    flip: bool = True,
    cutout: int = 0,
) -> Data:
    """Load Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747).

    The 60,000 training images are split into 50,000 for train and 10,000 for val by a fixed seed; test is the
    published 10,000. Images come as float32 of shape (1, 28, 28), normalised.

    Args:
        root: Folder with the four IDX ``.gz`` files; by default where Debian's package puts them.
        train_samples: Train on this many, the same ones every time and for every seed.
        crop_padding: Random shift of training images, in pixels.
        flip: Whether training images are mirrored at random.
        cutout: Side of the square that is blanked in training images (0: off).

    Raises:
        DataError: A file is missing or damaged, or `train_samples` is out of range.
    """
    folder = DEBIAN_FOLDER if root is None else Path(root)
    images = read_idx(folder / "train-images-idx3-ubyte.gz", dimensions=3)
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", dimensions=1).long()
    test_images = read_idx(folder / "t10k-images-idx3-ubyte.gz", dimensions=3)
    test_labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", dimensions=1).long()
    if len(images) <= _VAL_SAMPLES:
        raise DataError(
            f"the training file holds {len(images)} images, and val alone takes {_VAL_SAMPLES}",
            where="data.root",
            value=str(folder),
            hint=_HINT,
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    val, train = order[:_VAL_SAMPLES], order[_VAL_SAMPLES:]
    if train_samples is not None:
        if not 1 <= train_samples <= len(train):
            raise DataError(f"must be between 1 and {len(train)}", where="data.train_samples", value=train_samples)
        train = train[:train_samples]
    prepare = Normalise([_MEAN], [_STD])
    augment = Augment(crop_padding=crop_padding, flip=flip, cutout=cutout)

    def split(x: torch.Tensor, y: torch.Tensor, name: str, augment: Augment | None = None) -> TensorSplit:
        return TensorSplit((x.unsqueeze(1), y), augment=augment, prepare=prepare, where=f"data.{name}")

    return Data(
        name="fashion_mnist",
        train=split(images[train], labels[train], "train", augment),
        val=split(images[val], labels[val], "val"),
        test=split(test_images, test_labels, "test"),
    )


def read_idx(path: Path, *, dimensions: int) -> torch.Tensor:
    """Read a gzipped IDX file of unsigned bytes.

    Args:
        path: The file.
        dimensions: Dimensions that it must have.

    Returns:
        A uint8 tensor.

    Raises:
        DataError: The file is missing, is not such a file, or is cut short.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError as problem:
        raise DataError("the data file is missing", where="data.root", value=str(path), hint=_HINT) from problem
    except (OSError, EOFError, zlib.error) as problem:
        raise DataError(
            f"the data file cannot be read: {problem}", where="data.root", value=str(path), hint=_HINT
        ) from problem
    header = 4 + 4 * dimensions
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(
            f"not an IDX file of bytes with {dimensions} dimensions", where="data.root", value=str(path), hint=_HINT
        )
    shape = tuple(int(size) for size in np.frombuffer(raw, dtype=">u4", count=dimensions, offset=4))
    if len(raw) - header != int(np.prod(shape)):
        raise DataError("the data file is cut short", where="data.root", value=str(path), hint=_HINT)
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape).copy())
