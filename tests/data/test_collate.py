"""Padding of sequences."""

from __future__ import annotations

import pytest
import torch

from mil_cli.data.collate import pad_collate, stack_collate
from mil_cli.errors import DataError


def test_tuples_are_padded_and_get_lengths() -> None:
    samples = [(torch.ones(3, 2), torch.tensor([1, 2])), (torch.ones(5, 2), torch.tensor([3]))]
    x, x_lengths, y, y_lengths = pad_collate(samples)
    assert x.shape == (2, 5, 2)
    assert float(x.sum()) == 16
    assert x_lengths.tolist() == [3, 5]
    assert y.tolist() == [[1, 2], [3, -100]]
    assert y_lengths.tolist() == [2, 1]


def test_dicts_keep_their_keys() -> None:
    samples = [{"ids": torch.tensor([4, 5]), "labels": 1}, {"ids": torch.tensor([6]), "labels": 0}]
    batch = pad_collate(samples, multiple=4, pad_value=9)
    assert isinstance(batch, dict)
    assert batch["ids"].tolist() == [[4, 5, 9, 9], [6, 9, 9, 9]]
    assert batch["ids_lengths"].tolist() == [2, 1]
    assert batch["labels"].tolist() == [1, 0]
    assert "labels_lengths" not in batch


def test_what_cannot_be_a_batch_is_told() -> None:
    with pytest.raises(DataError, match="first axis"):
        pad_collate([(torch.ones(3, 2), 0), (torch.ones(3, 4), 1)])
    with pytest.raises(DataError, match="no usable entry 'labels'"):
        pad_collate([{"x": 1, "labels": 0}, {"x": 2}])
    with pytest.raises(DataError, match="tuple"):
        stack_collate([torch.zeros(2), torch.zeros(2)])
