"""A split whose passes end early, for trainings that are to be cheap."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from mil_cli.data.base import Batch, Split, batch_count


class Shortened:
    """A split of which each pass gives so many samples; shuffled passes give other ones each.

    Args:
        split: Where batches come from.
        samples: The most samples of a pass. A pass of whole batches ends with the last that fits; without, a pass
            gives whole batches until all samples are there, so that there may be a few more.
    """

    def __init__(self, split: Split, samples: int) -> None:
        self._split, self._samples = split, min(samples, len(split))

    def __len__(self) -> int:
        return self._samples

    def batches(self, batch_size: int, *, drop_last: bool = False, skip: int = 0, **options: Any) -> Iterator[Batch]:
        """Give the batches of one pass; see `Split.batches`."""
        count = batch_count(self._samples, batch_size, drop_last=drop_last)
        yield from islice(
            self._split.batches(batch_size, drop_last=drop_last, skip=skip, **options), max(0, count - skip)
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of the split's fingerprint and the length of a pass."""
        return hashlib.sha256(f"{self._split.fingerprint()} {self._samples} samples a pass".encode()).hexdigest()
