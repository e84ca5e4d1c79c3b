"""Datasets behind a DataLoader: the same batches with any number of workers, in any process, after any resume."""

from __future__ import annotations

import os
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mil_cli.data.base import Split
from mil_cli.data.collate import pad_collate
from mil_cli.data.datasets import DatasetSplit
from mil_cli.errors import DataError, MilError, ModelError


class Noisy(Dataset[Any]):
    """Draws from all three global generators."""

    def __init__(self, length: int = 11) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([index, float(torch.rand(())), random.random(), np.random.rand()]), index


def _flat(split: DatasetSplit, **settings: Any) -> list[torch.Tensor]:
    return [batch[0] for batch in split.batches(4, **settings)]  # type: ignore[index]


def test_batches_are_the_same_with_and_without_workers_and_after_a_skip() -> None:
    settings: dict[str, Any] = {"shuffle": True, "augment": True, "seed": 1, "epoch": 2}
    alone = _flat(DatasetSplit(Noisy()), **settings)
    workers = _flat(DatasetSplit(Noisy(), num_workers=2), **settings)
    assert [len(batch) for batch in alone] == [4, 4, 3]
    for left, right in zip(alone, workers, strict=True):
        assert torch.equal(left, right)
    rest = _flat(DatasetSplit(Noisy()), skip=1, **settings)
    for left, right in zip(alone[1:], rest, strict=True):
        assert torch.equal(left, right)
    other = _flat(DatasetSplit(Noisy()), **{**settings, "epoch": 3})
    assert not torch.equal(torch.cat(alone), torch.cat(other))


def test_reading_moves_nobodys_randomness() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    _flat(DatasetSplit(Noisy()), shuffle=True, augment=True)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_without_augmentation_every_pass_is_the_same() -> None:
    split = DatasetSplit(Noisy())
    first, second = _flat(split, seed=1, epoch=0), _flat(split, seed=2, epoch=5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_plain_view_is_given_without_augmentation() -> None:
    class Plain(Noisy):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.zeros(4), index

    split = DatasetSplit(Noisy(), plain=Plain())
    assert isinstance(split, Split)
    assert float(torch.cat(_flat(split)).abs().sum()) == 0
    assert float(torch.cat(_flat(split, augment=True)).abs().sum()) > 0
    with pytest.raises(DataError, match="differs in length"):
        DatasetSplit(Noisy(), plain=Plain(5))


def test_the_fingerprint_follows_the_content() -> None:
    class Changed(Noisy):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            value, label = super().__getitem__(index)
            return value, label + (index == 10)

    Changed.__qualname__ = Noisy.__qualname__
    assert DatasetSplit(Noisy()).fingerprint() == DatasetSplit(Noisy()).fingerprint()
    assert DatasetSplit(Noisy()).fingerprint() != DatasetSplit(Changed()).fingerprint()
    assert DatasetSplit(Noisy()).fingerprint() != DatasetSplit(Noisy(10)).fingerprint()
    padded = [
        DatasetSplit(Noisy(), collate_fn=partial(pad_collate, multiple=multiple)).fingerprint()
        for multiple in (1, 1, 2)
    ]
    assert padded[0] == padded[1]
    assert len({*padded, DatasetSplit(Noisy()).fingerprint()}) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_fails_is_named(workers: int) -> None:
    class Broken(Noisy):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            if index == 7:
                raise ValueError("bad file")
            return super().__getitem__(index)

    split = DatasetSplit(Broken(), num_workers=workers, where="data.val")
    with pytest.raises(DataError, match="sample 7 cannot be read: ValueError: bad file") as caught:
        _flat(split)
    assert "Traceback" not in str(caught.value)
    assert caught.value.where == "data.val"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_function_that_fails_is_told_with_its_line(workers: int) -> None:
    def collate(samples: Any) -> Any:
        raise ValueError("no batch")

    split = DatasetSplit(Noisy(), collate_fn=collate, num_workers=workers, where="data.val")
    with pytest.raises(DataError, match=r"ValueError: no batch\n  -> raised at .*test_datasets\.py:") as caught:
        _flat(split)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_sample_say_the_same_with_and_without_workers(workers: int) -> None:
    class Broken(Noisy):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            raise ModelError("cannot be read", where="data.root", value="a.png", hint="replace it")

    with pytest.raises(MilError) as caught:
        _flat(DatasetSplit(Broken(), num_workers=workers))
    assert str(caught.value) == "data.root: cannot be read (got 'a.png')\n  -> replace it"


@pytest.mark.parametrize("workers", [-1, "two", True])
def test_workers_that_are_no_count_are_refused(workers: Any) -> None:
    with pytest.raises(DataError, match=r"data\.num_workers"):
        DatasetSplit(Noisy(), num_workers=workers)


def test_a_loader_process_that_dies_is_told() -> None:
    class Deadly(Noisy):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            os._exit(1)

    with pytest.raises(DataError, match="num_workers"):
        _flat(DatasetSplit(Deadly(), num_workers=1))


def test_samples_that_make_no_batch_are_told() -> None:
    class Ragged(Noisy):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.zeros(index + 1), index

    with pytest.raises(DataError, match="pad_collate"):
        DatasetSplit(Ragged()).check()

    class Nan(Noisy):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.full((2,), float("nan")), index

    with pytest.raises(DataError, match="NaN"):
        DatasetSplit(Nan()).check()
    with pytest.raises(DataError, match="empty"):
        DatasetSplit(Noisy(0))


def test_a_part_gives_the_samples_at_its_places() -> None:
    class Plain(Noisy):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.full((4,), float(index)), index

    part = DatasetSplit(Noisy(), plain=Plain()).part(torch.tensor([5, 2]))
    assert len(part) == 2
    (plain,) = part.batches(4)
    assert plain[1].tolist() == plain[0][:, 0].tolist() == [5, 2]  # type: ignore[index]
    (loud,) = part.batches(4, augment=True)
    assert loud[0][:, 0].tolist() == [5, 2]  # type: ignore[index]
    assert 0 < float(loud[0][0, 1]) < 1  # type: ignore[index]
