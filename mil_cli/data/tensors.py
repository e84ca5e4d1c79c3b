"""The in-memory split: whole tensors, indexed and augmented a batch at a time; no workers, no per-sample Python."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch

from mil_cli.data.augment import Augment
from mil_cli.data.base import Batch, batch_indices, epoch_order, mix_seed
from mil_cli.errors import DataError


class Normalise:
    """Turns stored images into what the model gets: ``(x - mean) / std`` in float32, channel by channel.

    Args:
        mean: Mean of each channel, in the units of the stored images.
        std: Standard deviation of each channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        if len(self.mean) != len(self.std) or any(value <= 0 for value in self.std):
            raise DataError("mean and std need one number per channel, std above 0", value=(self.mean, self.std))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images of shape (batch, channels, height, width)."""
        shape = (1, -1) + (1,) * (images.ndim - 2)
        scale = 1.0 / torch.tensor(self.std).view(shape)
        return torch.addcmul(-torch.tensor(self.mean).view(shape) * scale, images.float(), scale)

    def __repr__(self) -> str:
        return f"Normalise({self.mean}, {self.std})"


class TensorSplit:
    """A split held in memory.

    Args:
        tensors: A sequence or mapping of tensors of equal length along axis 0; batches have the same form
            (tuple or dict).
        augment: Applied to the entry `image` of batches that are asked for with ``augment=True``, before `prepare`.
        prepare: Applied to the entry `image` of every batch: for images that are stored as bytes.
        image: Position or key of the entry that `augment` and `prepare` work on.
        where: What messages call the split, such as ``data.train``.

    Raises:
        DataError: No samples, lengths that differ, or values that are not finite.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
        *,
        augment: Augment | None = None,
        prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
        image: int | str | None = None,
        where: str = "data",
    ) -> None:
        self._keys = tuple(tensors) if isinstance(tensors, Mapping) else None
        self._tensors = tuple(tensors.values()) if isinstance(tensors, Mapping) else tuple(tensors)
        self._names: tuple[int | str, ...] = self._keys or tuple(range(len(self._tensors)))
        _check_tensors(self._tensors, self._names, where)
        self._augment = augment
        self._prepare = prepare
        wanted = self._names[0] if image is None else image
        if wanted not in self._names:
            raise DataError("no such entry in the batches", where=f"{where}.image", value=image)
        self._image = self._names.index(wanted)

    def __len__(self) -> int:
        return len(self._tensors[0])

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
        order = epoch_order(len(self), shuffle=shuffle, seed=seed, epoch=epoch)
        for number, indices in batch_indices(order, batch_size, drop_last=drop_last, skip=skip, shard=shard):
            # Copies also where the order is plain: a model that writes into its input must not reach the data.
            entries = [tensor.index_select(0, indices) for tensor in self._tensors]
            image = entries[self._image]
            if augment and self._augment is not None:
                generator = torch.Generator().manual_seed(mix_seed(seed, epoch, number, shard[0]))
                image = self._augment(image, generator)
            if self._prepare is not None:
                image = self._prepare(image)
            entries[self._image] = image
            yield dict(zip(self._keys, entries, strict=True)) if self._keys is not None else tuple(entries)

    def part(self, indices: torch.Tensor) -> TensorSplit:
        """Return a split of some of the samples; see `mil_cli.data.base.Divisible`."""
        taken = [tensor[indices] for tensor in self._tensors]
        return TensorSplit(
            taken if self._keys is None else dict(zip(self._keys, taken, strict=True)),
            augment=self._augment,
            prepare=self._prepare,
            image=self._names[self._image],
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of the tensors, and of how they are augmented and prepared."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self._names, self._augment, self._image, _describe(self._prepare))).encode())
        for tensor in self._tensors:
            digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _describe(function: object) -> str:
    """Describe a callable by value where it can, so that the text is the same in every process."""
    if function is None or isinstance(function, Normalise):
        return repr(function)
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _check_tensors(tensors: Sequence[torch.Tensor], names: Sequence[int | str], where: str) -> None:
    if not tensors:
        raise DataError("the split holds nothing", where=where, hint="give at least an input and a target tensor")
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0:
            raise DataError(
                "every entry of a split must be a tensor with the samples along axis 0",
                where=f"{where}[{name!r}]",
                value=type(tensor).__name__,
            )
    lengths = {name: len(tensor) for name, tensor in zip(names, tensors, strict=True)}
    if len(set(lengths.values())) != 1:
        raise DataError(
            "the tensors of a split differ in length",
            where=where,
            value=lengths,
            hint="every tensor needs one row per sample",
        )
    if len(tensors[0]) == 0:
        raise DataError("the split is empty", where=where, hint="check the folder, the filter or the split's size")
    for name, tensor in zip(names, tensors, strict=True):
        check_finite(tensor, where=f"{where}[{name!r}]")


def check_finite(tensor: torch.Tensor, *, where: str) -> None:
    """Refuse floating-point values that are NaN or infinite.

    Raises:
        DataError: Some are; the message counts them and gives the first sample.
    """
    if not tensor.is_floating_point():
        return
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        first = int(bad.reshape(len(tensor), -1).any(1).nonzero()[0]) if tensor.ndim else 0
        raise DataError(
            f"{int(bad.sum())} of {tensor.numel()} values are NaN or infinite, first in sample {first}",
            where=where,
            hint="clean the data: drop those samples or fill the values in",
        )
