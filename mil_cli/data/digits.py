"""The digits data set: 1,797 8x8 grey images of ten classes, embedded in scikit-learn; needs nothing else."""

from __future__ import annotations

import torch

from mil_cli.data.augment import Augment
from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import DataError

_SPLIT_SEED = 0


def digits(*, val_samples: int = 270, test_samples: int = 360, crop_padding: int = 1) -> Data:
    """Load the digits, split at random by a fixed seed; images are float32 of shape (1, 8, 8) in [-1, 1].

    Args:
        val_samples: Samples of the val split.
        test_samples: Samples of the test split; the rest trains.
        crop_padding: Random shift of training images, in pixels.

    Raises:
        DataError: The sizes leave nothing to train on.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    loaded = load_digits()
    images = torch.from_numpy(loaded.images).float().unsqueeze(1) / 8.0 - 1.0
    labels = torch.from_numpy(loaded.target).long()
    for name, size in (("val_samples", val_samples), ("test_samples", test_samples)):
        if size < 1:
            raise DataError("a split needs at least one sample", where=f"data.{name}", value=size)
    if val_samples + test_samples >= len(images):
        raise DataError(
            f"val and test take all {len(images)} samples",
            where="data.val_samples",
            value=val_samples,
            hint="leave samples for training",
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    test, val, train = (
        order[:test_samples],
        order[test_samples : test_samples + val_samples],
        order[test_samples + val_samples :],
    )
    augment = Augment(crop_padding=crop_padding, fill=-1.0) if crop_padding else None
    return Data(
        name="digits",
        train=TensorSplit((images[train], labels[train]), augment=augment, where="data.train"),
        val=TensorSplit((images[val], labels[val]), where="data.val"),
        test=TensorSplit((images[test], labels[test]), where="data.test"),
    )
