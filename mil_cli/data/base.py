"""What data are: three splits with fixed roles, each giving batches that its arguments fully determine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from mil_cli.errors import DataError

Batch: TypeAlias = tuple[Any, ...] | Mapping[str, Any]
"""One batch: a tuple or a mapping of tensors, the batch along axis 0 of each."""


@runtime_checkable
class Split(Protocol):
    """One split of the data."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        skip: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """Give the batches of one pass; the same arguments always give the same batches.

        Args:
            batch_size: Samples per batch, over all shards.
            shuffle: Whether to give the samples in an order drawn from `seed` and `epoch`.
            augment: Whether to augment (training only).
            seed: Seed of order and augmentation.
            epoch: Number of the pass; changes order and augmentation.
            drop_last: Whether to leave out a last batch that is not full.
            skip: Batches to leave out at the start, without making them: an exact resume.
            shard: ``(rank, count)``: give every `count`-th sample of each batch, beginning at `rank`.
        """
        ...

    def fingerprint(self) -> str:
        """Return the SHA-256 of the split's content."""
        ...


@runtime_checkable
class Divisible(Split, Protocol):
    """A split of which parts can be made."""

    def part(self, indices: torch.Tensor) -> Split:
        """Return a split of some of the samples, augmented as they are here.

        Args:
            indices: Their places in the order that is not shuffled, int64 of shape (samples,).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set.

    Attributes:
        name: What reports call it.
        train: Changes weights.
        val: Makes every decision.
        test: Read for the baseline and for the final file, nothing else.
    """

    name: str
    train: Split
    val: Split
    test: Split


def halves(split: Split, *, seed: int) -> tuple[Split, Split]:
    """Divide a split in two at random.

    Args:
        split: The split, of at least two samples.
        seed: Which sample is in which half follows from it.

    Raises:
        DataError: It has one sample, or is of a kind of one's own that makes no parts.
    """
    if len(split) < 2:
        raise DataError("too few samples to divide", where="data.train", value=len(split))
    order = epoch_order(len(split), shuffle=True, seed=seed, epoch=0)
    middle = len(split) // 2
    return part_of(split, order[:middle]), part_of(split, order[middle:])


def part_of(split: Split, indices: torch.Tensor) -> Split:
    """Return some samples of a split as a split; see `Divisible.part`.

    Raises:
        DataError: It is of a kind of one's own that makes no parts.
    """
    if not isinstance(split, Divisible):
        raise DataError(
            "the split cannot be divided",
            where="data.train",
            value=type(split).__name__,
            hint="return tensors or a dataset for it, or give the class a method part(indices)",
        )
    return split.part(indices)


def epoch_order(samples: int, *, shuffle: bool, seed: int, epoch: int) -> torch.Tensor:
    """Return the order of samples of one pass, as int64 indices of shape (samples,)."""
    if not shuffle:
        return torch.arange(samples)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(mix_seed(seed, epoch)))


def batch_indices(
    order: torch.Tensor, batch_size: int, *, drop_last: bool, skip: int, shard: tuple[int, int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Cut an order into batches; give each batch's number and this shard's indices of it."""
    rank, count = shard
    total = len(order)
    stop = total - total % batch_size if drop_last else total
    for number, start in enumerate(range(0, stop, batch_size)):
        if number < skip:
            continue
        indices = order[start : min(start + batch_size, stop)][rank::count]
        if len(indices):
            yield number, indices


def batch_count(samples: int, batch_size: int, *, drop_last: bool) -> int:
    """Return how many batches one pass has."""
    return samples // batch_size if drop_last else -(-samples // batch_size)


def mix_seed(*parts: int) -> int:
    """Mix integers into one 63-bit seed (splitmix64), so that near seeds give unrelated streams."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
        state = state * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def repeated(batch: Batch, length: int) -> Batch:
    """Return a batch of so many samples, those of `batch` over and over in their order."""
    samples = batch_length(batch)
    order = torch.arange(length) % samples

    def longer(value: Any) -> Any:
        whole = isinstance(value, torch.Tensor) and value.ndim and len(value) == samples
        return value[order.to(value.device)] if whole else value

    if isinstance(batch, Mapping):
        return {name: longer(value) for name, value in batch.items()}
    return tuple(longer(value) for value in batch)


def batch_length(batch: Batch) -> int:
    """Return the number of samples of a batch: the length of its first tensor."""
    for value in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(value, torch.Tensor) and value.ndim:
            return len(value)
    raise DataError(
        "a batch holds no tensor with the samples along axis 0",
        where="data",
        value=type(batch).__name__,
        hint="return tensors from the dataset's __getitem__",
    )
