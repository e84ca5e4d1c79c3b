"""A split whose batches are changed as they come, such as mixed with each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

import torch

from mil_cli.data.base import Batch, Data, Split, mix_seed

Change: TypeAlias = Callable[[Batch, torch.Generator], Batch]
"""(batch, generator) -> another batch, drawn from the generator alone; the first one is not changed."""


class Changed:
    """A split whose batches pass through a change before training sees them.

    Args:
        split: Where batches come from.
        change: What is done to each batch that is asked for with ``augment=True``; its draws follow from seed, epoch,
            the batch's number and the shard, so that a resumed pass goes on alike.
        name: What the change is, with its settings, for the fingerprint.
    """

    def __init__(self, split: Split, change: Change, *, name: str) -> None:
        self._split, self._change, self._name = split, change, name

    def __len__(self) -> int:
        return len(self._split)

    def batches(
        self,
        batch_size: int,
        *,
        augment: bool = False,
        seed: int = 0,
        epoch: int = 0,
        skip: int = 0,
        shard: tuple[int, int] = (0, 1),
        **options: Any,
    ) -> Iterator[Batch]:
        """Give the batches of one pass; see `Split.batches`."""
        whole = self._split.batches(
            batch_size, augment=augment, seed=seed, epoch=epoch, skip=skip, shard=shard, **options
        )
        for number, batch in enumerate(whole, start=skip):
            if augment:
                # One more part than the seed of augmentation has, so that the two do not draw the same.
                generator = torch.Generator().manual_seed(mix_seed(seed, epoch, number, shard[0], 1))
                batch = self._change(batch, generator)
            yield batch

    def fingerprint(self) -> str:
        """Return the SHA-256 of the split's fingerprint and the change's name."""
        return hashlib.sha256(f"{self._split.fingerprint()} {self._name}".encode()).hexdigest()


def with_train(data: Data, train: Split) -> Data:
    """Return data with another split to train on; `val` and `test` stay, and are not read before they are asked for."""
    return cast("Data", _WithTrain(data, train))


class _WithTrain:
    def __init__(self, data: Data, train: Split) -> None:
        self._data, self.train, self.name = data, train, data.name

    @property
    def val(self) -> Split:
        return self._data.val

    @property
    def test(self) -> Split:
        return self._data.test
