"""A user's own data: every form that a function may return, and every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from mil_cli.data.datasets import DatasetSplit
from mil_cli.data.source import LoaderConfig, as_data, build_data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import DataError

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10)
SOURCE = """
import torch
from torch.utils.data import Dataset, TensorDataset

class Rows(Dataset):
    def __init__(self, count, ragged=False):
        self.count, self.ragged = count, ragged
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        length = index % 3 + 1 if self.ragged else 2
        return {"x": torch.full((length, 2), float(index)), "labels": index % 2}

def build(count=6, ragged=False):
    return {"train": Rows(count, ragged), "val": Rows(3, ragged), "test": Rows(4, ragged)}

def no_val(count=10):
    return {"train": Rows(count), "test": Rows(4)}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own_rows_data.py").write_text(SOURCE)
    return tmp_path


def test_datasets_with_dict_samples(folder: Path) -> None:
    data = build_data({"_target_": "own_rows_data.build", "count": 5}, folder)
    assert (len(data.train), len(data.val), len(data.test)) == (5, 3, 4)
    batch = next(iter(data.train.batches(3)))
    assert isinstance(batch, dict)
    assert batch["x"].shape == (3, 2, 2)
    assert batch["labels"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "collate", ["mil_cli.data.collate.pad_collate", {"_target_": "mil_cli.data.collate.pad_collate", "multiple": 5}]
)
def test_padded_sequences_by_a_collate_function(folder: Path, collate: Any) -> None:
    config = {"_target_": "own_rows_data.build", "ragged": True, "loader": {"collate_fn": collate}}
    batch = next(iter(build_data(config, folder).train.batches(3)))
    assert isinstance(batch, dict)
    assert batch["x"].shape == (3, 3 if isinstance(collate, str) else 5, 2)
    assert batch["x_lengths"].tolist() == [1, 2, 3]


def test_val_can_be_drawn_from_train(folder: Path) -> None:
    config = {"_target_": "own_rows_data.no_val", "loader": {"val_fraction": 0.2}}
    data = build_data(config, folder)
    assert (len(data.train), len(data.val)) == (8, 2)
    rows = [next(iter(split.batches(99)))["x"][:, 0, 0].tolist() for split in (data.train, data.val)]  # type: ignore[call-overload]
    assert sorted(rows[0] + rows[1]) == list(range(10))
    with pytest.raises(DataError, match="val_fraction"):
        build_data({"_target_": "own_rows_data.no_val"}, folder)


@pytest.mark.parametrize(
    "split",
    [
        TensorDataset(X, Y),
        Subset(TensorDataset(X, Y), [3, 1, 2]),
        (X, Y),
        (X.numpy(), np.arange(10)),
        {"x": X, "y": Y},
    ],
)
def test_tensors_take_the_fast_path(split: Any) -> None:
    data = as_data({"train": split, "val": split, "test": split})
    assert isinstance(data.train, TensorSplit)
    batch = next(iter(data.train.batches(2)))
    labels = batch["y"] if isinstance(batch, dict) else batch[1]
    assert labels.tolist() == ([3, 1] if isinstance(split, Subset) else [0, 1])


def test_an_unaugmented_view_of_train() -> None:
    data = as_data(
        {
            "train": TensorDataset(X, Y),
            "train_plain": TensorDataset(X * 0, Y),
            "val": TensorDataset(X, Y),
            "test": (X, Y),
        }
    )
    assert isinstance(data.train, DatasetSplit)
    assert float(next(iter(data.train.batches(4)))[0].sum()) == 0  # type: ignore[index]
    assert float(next(iter(data.train.batches(4, augment=True)))[0].sum()) > 0  # type: ignore[index]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"train": (X, Y), "test": (X, Y)}, "there is no val split"),
        ({"train": (X, Y), "val": (X, Y)}, "there is no test split"),
        ({"train": (X, Y), "val": (X, Y), "tset": (X, Y)}, "did you mean 'test'"),
        ((X, Y), "must return"),
        (None, "must return"),
        ({"train": (X[:0], Y[:0]), "val": (X, Y), "test": (X, Y)}, "empty"),
        ({"train": (X, Y[:3]), "val": (X, Y), "test": (X, Y)}, "differ in length"),
        ({"train": (X / 0 * 0, Y), "val": (X, Y), "test": (X, Y)}, "NaN"),
        ({"train": 3, "val": (X, Y), "test": (X, Y)}, "neither a dataset nor tensors"),
        ({"train": {"x": "words"}, "val": (X, Y), "test": (X, Y)}, "cannot be made a tensor"),
    ],
)
def test_what_is_wrong_is_told(made: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        as_data(made)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ((torch.zeros(9, 2), torch.zeros(4)), "differ in length"),
        ((), "holds nothing"),
        ((torch.zeros(3, 2), torch.tensor(1)), "along axis 0"),
    ],
)
def test_tensors_are_checked_before_val_is_drawn(train: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        as_data({"train": train, "test": train}, loader=LoaderConfig(val_fraction=0.5))


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ({"workers": 2}, "num_workers"),
        ({"num_workers": -1}, "num_workers"),
        ({"collate_fn": "mil_cli.data.collate.pad_colate"}, "did you mean 'pad_collate'"),
        ({"val_fraction": 2.0}, "between 0 and 1"),
        ({"val_fraction": "10%"}, "number between 0 and 1"),
        (3, "mapping"),
    ],
)
def test_loader_settings_are_checked(folder: Path, loader: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        build_data({"_target_": "own_rows_data.no_val", "loader": loader}, folder)


def test_the_loader_section_has_defaults() -> None:
    assert LoaderConfig() == LoaderConfig(collate_fn=None, num_workers=0, val_fraction=None)
