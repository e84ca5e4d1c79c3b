"""The data: a function that returns the three splits, each a dataset, a tuple of tensors, or a dict of tensors."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, TensorDataset


def build() -> dict[str, Dataset]:
    """Return train (changes weights), val (makes decisions) and test (is only reported).

    Any map-style dataset will do; a batch may be a tuple (inputs..., target) or a dict with the key `labels`.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(digits.target, dtype=torch.long)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return {
        "train": TensorDataset(images[630:], labels[630:]),
        "val": TensorDataset(images[:270], labels[:270]),
        "test": TensorDataset(images[270:630], labels[270:630]),
    }
