"""The split over a torch Dataset: a DataLoader whose order and randomness are fixed by seed and epoch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

from mil_cli.data.base import Batch, batch_indices, epoch_order, mix_seed
from mil_cli.data.collate import as_batch, stack_collate
from mil_cli.data.tensors import check_finite
from mil_cli.errors import DataError, MilError
from mil_cli.models.user_code import source_line, source_sha256

_PLAIN_EPOCH = -1


def check_workers(workers: object, *, where: str) -> None:
    """Refuse a number of loader processes that is none.

    Raises:
        DataError: It is no whole number, or below 0.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise DataError("must be a count of processes, 0 or more", where=where, value=workers)


class DatasetSplit:
    """A split over a map-style dataset.

    Whatever a sample draws at random (from torch, numpy or `random`) is drawn from a seed of its own, made from seed,
    epoch and index: the batches are the same with any number of workers and after a resume, and nobody else's
    randomness moves.

    Args:
        dataset: Has `__len__` and `__getitem__`; samples are tuples or dicts.
        plain: The same samples without augmentation, given for ``augment=False``; None: `dataset` itself.
        collate_fn: Makes a batch of a list of samples.
        num_workers: Loader processes; 0 loads in this one.
        where: What messages call the split, such as ``data.train``.

    Raises:
        DataError: The dataset has no length or no samples, or `num_workers` is no count.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        plain: Dataset[Any] | None = None,
        collate_fn: Callable[[Sequence[Any]], Any] | None = None,
        num_workers: int = 0,
        where: str = "data",
    ) -> None:
        check_workers(num_workers, where="data.num_workers")
        self._dataset = dataset
        self._plain = dataset if plain is None else plain
        self._collate = stack_collate if collate_fn is None else collate_fn
        self._workers = num_workers
        self._where = where
        self._length = _length(dataset, where)
        if _length(self._plain, where) != self._length:
            raise DataError(
                "the unaugmented view differs in length",
                where=where,
                value=(self._length, _length(self._plain, where)),
                hint="both views must hold the same samples in the same order",
            )

    def __len__(self) -> int:
        return self._length

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
        """Give the batches of one pass; see `Split.batches`."""
        order = epoch_order(self._length, shuffle=shuffle, seed=seed, epoch=epoch)
        chosen = [
            indices.tolist()
            for _, indices in batch_indices(order, batch_size, drop_last=drop_last, skip=skip, shard=shard)
        ]
        if not chosen:
            return
        dataset = self._dataset if augment else self._plain
        # Without augmentation a sample is the same in every pass, also where the dataset itself draws at random.
        stream = (seed, epoch) if augment else (0, _PLAIN_EPOCH)
        loader: DataLoader[Any] = DataLoader(
            _Seeded(dataset, stream, self._where),
            batch_sampler=chosen,
            collate_fn=_Collate(self._collate, self._where),
            num_workers=self._workers,
            # The loader draws a base seed for its workers: from here, so that the global generator does not move.
            generator=torch.Generator().manual_seed(mix_seed(*stream)),
        )
        for batch in self._loaded(loader):
            if isinstance(batch, _Failure):
                raise DataError(batch.what, where=batch.where, hint=batch.hint, **batch.value)
            yield as_batch(batch)

    def _loaded(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Give what a loader gives.

        Raises:
            DataError: A loader process has ended before its time.
        """
        loaded = iter(loader)
        while True:
            try:
                batch = next(loaded)
            except StopIteration:
                return
            except RuntimeError as problem:
                if "DataLoader worker" not in str(problem):
                    raise
                raise DataError(
                    f"a loader process has ended: {problem}",
                    where=self._where,
                    hint="most likely the memory (or shared memory) ran out: set fewer num_workers, or 0 to load in one"
                    " process",
                ) from problem
            yield batch

    def part(self, indices: torch.Tensor) -> DatasetSplit:
        """Return a split of some of the samples; see `mil_cli.data.base.Divisible`."""
        chosen = indices.tolist()
        plain = None if self._plain is self._dataset else Subset(self._plain, chosen)
        return DatasetSplit(
            Subset(self._dataset, chosen),
            plain=plain,
            collate_fn=self._collate,
            num_workers=self._workers,
            where=self._where,
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of the content: by the dataset's own `fingerprint()` if it has one, else every sample."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        made_of = (type(self._dataset).__qualname__, self._length, _describe_collate(self._collate))
        digest = hashlib.sha256(repr(made_of).encode())
        for dataset in [self._dataset] if self._plain is self._dataset else [self._dataset, self._plain]:
            own = getattr(dataset, "fingerprint", None)
            if callable(own):
                digest.update(str(own()).encode())
                continue
            seeded = _Seeded(dataset, (0, _PLAIN_EPOCH), self._where)
            for index in range(self._length):
                _hash_value(digest, seeded[index])
        return digest.hexdigest()

    def check(self, samples: int = 16) -> None:
        """Read the first samples and refuse NaN, infinities and samples that make no batch.

        Raises:
            DataError: What is wrong with them.
        """
        for batch in self.batches(min(samples, self._length)):
            items = batch.items() if isinstance(batch, dict) else enumerate(batch)
            for name, value in items:
                if isinstance(value, torch.Tensor):
                    check_finite(value, where=f"{self._where}[{name!r}]")
            return


@dataclass(frozen=True)
class _Failure:
    """A problem met in a loader process, on its way to this one: an exception would arrive as a traceback's text."""

    what: str
    where: str | None
    hint: str | None
    value: dict[str, Any]

    @classmethod
    def of(cls, problem: MilError) -> _Failure:
        return cls(problem.what, problem.where, problem.hint, {"value": _Shown(problem)} if problem.has_value else {})


class _Shown:
    """A value as messages show it: it goes from process to process whatever the value was."""

    def __init__(self, problem: MilError) -> None:
        self._text = repr(problem.value)

    def __repr__(self) -> str:
        return self._text


class _Collate:
    def __init__(self, collate: Callable[[Sequence[Any]], Any], where: str) -> None:
        self._collate = collate
        self._where = where

    def __call__(self, samples: Sequence[Any]) -> Any:
        for sample in samples:
            if isinstance(sample, _Failure):
                return sample
        try:
            return self._collate(samples)
        except MilError as problem:
            return _Failure.of(problem)
        except Exception as problem:
            line = source_line(problem)
            what = f"collating a batch failed: {type(problem).__name__}: {problem}"
            return _Failure(what, self._where, f"raised at {line}" if line else None, {})


class _Seeded(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any], stream: tuple[int, int], where: str) -> None:
        self._dataset = dataset
        self._stream = stream
        self._where = where

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        seed = mix_seed(*self._stream, index)
        if get_worker_info() is not None:
            try:
                return self._read(index, seed)
            except MilError as problem:
                return _Failure.of(problem)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        try:
            return self._read(index, seed)
        finally:
            torch.set_rng_state(states[0])
            random.setstate(states[1])
            np.random.set_state(states[2])

    def _read(self, index: int, seed: int) -> Any:
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        try:
            return self._dataset[index]
        except MilError:
            raise
        except Exception as problem:
            line = source_line(problem)
            raise DataError(
                f"sample {index} cannot be read: {type(problem).__name__}: {problem}",
                where=self._where,
                hint=f"raised at {line}" if line else None,
            ) from problem


def _describe_collate(collate: Callable[[Sequence[Any]], Any]) -> str:
    if isinstance(collate, partial):
        return f"{_describe_collate(collate.func)} {collate.args!r} {sorted(collate.keywords.items())!r}"
    return f"{getattr(collate, '__qualname__', type(collate).__qualname__)} {source_sha256(collate)}"


def _length(dataset: Dataset[Any], where: str) -> int:
    try:
        length = len(dataset)  # type: ignore[arg-type]
    except TypeError as problem:
        raise DataError(
            "the dataset has no length",
            where=where,
            value=type(dataset).__name__,
            hint="give a map-style dataset with __len__ and __getitem__",
        ) from problem
    if length == 0:
        raise DataError("the split is empty", where=where, hint="check the folder, the filter or the split's size")
    return length


def _hash_value(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key in value:
            digest.update(f"{key}:".encode())
            _hash_value(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}[".encode())
        for item in value:
            _hash_value(digest, item)
    elif isinstance(value, torch.Tensor | np.ndarray):
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, torch.Tensor) else value
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    else:
        digest.update(repr(value).encode())
