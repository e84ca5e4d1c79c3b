"""A histogram of a stream of values, in bounded memory, whose range grows as needed."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 2**23
"""Values counted at once: float32 counts stay exact."""


class Histogram:
    """Counts of values in equal bins over ``[-limit, limit]``.

    When a value lies outside, the limit doubles and neighbouring bins are merged, so counts are always exact and the
    memory is fixed. The edges include 0.

    Args:
        bins: How many bins; a multiple of 4.
    """

    def __init__(self, bins: int = 8192) -> None:
        if bins < 4 or bins % 4:
            raise ValueError(f"a histogram needs a multiple of 4 bins, not {bins}")
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.limit = 0.0
        self.minimum = float("inf")
        self.maximum = float("-inf")

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, float64."""
        bins = len(self.counts)
        return (torch.arange(bins, dtype=torch.float64) + 0.5) * self.bin_width - self.limit

    @property
    def bin_width(self) -> float:
        """The width of one bin."""
        return 2 * self.limit / len(self.counts)

    def update(self, values: Tensor) -> None:
        """Count a tensor's values.

        Raises:
            ValueError: There is a NaN or an infinity among them.
        """
        values = values.detach().reshape(-1).float()
        if not values.numel():
            return
        minimum, maximum = (float(value) for value in torch.aminmax(values))
        if not (abs(minimum) < float("inf") and abs(maximum) < float("inf")):
            raise ValueError("NaN or infinity among the values")
        self.minimum, self.maximum = min(self.minimum, minimum), max(self.maximum, maximum)
        self._grow(max(-minimum, maximum))
        if self.limit == 0.0:  # nothing but zeros so far
            self.counts[len(self.counts) // 2] += values.numel()
            return
        for start in range(0, len(values), _CHUNK):
            chunk = values[start : start + _CHUNK]
            self.counts += torch.histc(chunk, len(self.counts), -self.limit, self.limit).double()

    def _grow(self, largest: float) -> None:
        if self.limit == 0.0:
            self.limit = largest
        bins = len(self.counts)
        while largest > self.limit:
            merged = torch.zeros_like(self.counts)
            merged[bins // 4 : bins - bins // 4] = self.counts.reshape(-1, 2).sum(1)
            self.counts = merged
            self.limit *= 2
