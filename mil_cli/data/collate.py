"""Collating samples into a batch: the default, and padding of sequences of different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from mil_cli.data.base import Batch
from mil_cli.errors import DataError


def stack_collate(samples: Sequence[Any]) -> Batch:
    """Stack samples of equal shapes into one batch (tuple or dict); PyTorch's default.

    Raises:
        DataError: The samples differ in shape or cannot be stacked.
    """
    try:
        batch = default_collate(list(samples))
    except (RuntimeError, TypeError, KeyError) as problem:
        raise DataError(
            f"the samples of a batch cannot be stacked: {problem}",
            where="data",
            hint="for sequences of different lengths set data.loader.collate_fn: mil_cli.data.collate.pad_collate",
        ) from problem
    return as_batch(batch)


def pad_collate(
    samples: Sequence[Any], *, pad_value: float = 0.0, target_pad_value: int = -100, multiple: int = 1
) -> Batch:
    """Pad every entry along its first axis to the longest in the batch, and add the lengths.

    Tuple samples ``(x, ..., y)`` give ``(x, ..., lengths of x, y, lengths of y)``, each length only for entries
    whose length varies by nature (1 or more dimensions). Dict samples keep their keys; ``<key>_lengths`` is added for
    each padded entry. Scalars are stacked.

    Args:
        samples: Tuples or dicts of tensors, arrays or numbers.
        pad_value: Fills floating-point entries and integer inputs.
        target_pad_value: Fills integer entries called ``target``, ``targets``, ``label`` or ``labels``, and the last
            entry of a tuple.
        multiple: Round the padded length up to a multiple of this.

    Returns:
        The batch; lengths are int64 of shape (batch,).

    Raises:
        DataError: The samples differ in form.
    """
    first = samples[0]
    if isinstance(first, Mapping):
        batch: dict[str, torch.Tensor] = {}
        for key in first:
            is_target = key in ("target", "targets", "label", "labels")
            values = [_entry(sample, key) for sample in samples]
            padded, lengths = _pad(values, _fill(values, is_target, pad_value, target_pad_value), multiple)
            batch[key] = padded
            if lengths is not None:
                batch[f"{key}_lengths"] = lengths
        return batch
    entries: list[torch.Tensor] = []
    count = len(first)
    for position in range(count):
        is_target = position == count - 1
        values = [_entry(sample, position) for sample in samples]
        padded, lengths = _pad(values, _fill(values, is_target, pad_value, target_pad_value), multiple)
        entries.append(padded)
        if lengths is not None:
            entries.append(lengths)
    return tuple(entries)


def as_batch(batch: Any) -> Batch:
    """Bring what a collate function returned into a tuple or a dict.

    Raises:
        DataError: It is neither a sequence nor a mapping.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, list | tuple):
        return tuple(batch)
    raise DataError(
        "a sample must be a tuple (inputs..., target) or a dict",
        where="data",
        value=type(batch).__name__,
        hint="return (x, y) from the dataset's __getitem__",
    )


def _entry(sample: Any, name: int | str) -> torch.Tensor:
    try:
        return torch.as_tensor(sample[name])
    except (KeyError, IndexError, TypeError, ValueError) as problem:
        raise DataError(f"a sample has no usable entry {name!r}: {problem}", where="data") from problem


def _fill(values: Sequence[torch.Tensor], is_target: bool, pad_value: float, target_pad_value: int) -> float:
    return target_pad_value if is_target and not values[0].is_floating_point() else pad_value


def _pad(values: Sequence[torch.Tensor], fill: float, multiple: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    if values[0].ndim == 0:
        return torch.stack(list(values)), None
    lengths = torch.tensor([len(value) for value in values])
    longest = -(-int(lengths.max()) // multiple) * multiple
    tails = {tuple(value.shape[1:]) for value in values}
    if len(tails) != 1:
        raise DataError(
            "the samples of a batch differ in more than their first axis", where="data", value=sorted(tails)
        )
    padded = values[0].new_full((len(values), longest, *tails.pop()), fill)
    for row, value in zip(padded, values, strict=True):
        row[: len(value)] = value
    return padded, lengths
