"""Observes the range that holds all but a small share of the values: outliers are clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from mil_cli.stages.quantize.observers.histogram import Histogram


class Percentile:
    """The range between the percentiles ``100 - percentile`` and `percentile`, to one bin of a histogram.

    Args:
        percentile: Such as 99.99; 100 is the same as min-max.
    """

    def __init__(self, percentile: float) -> None:
        self._share = percentile / 100
        self._histogram = Histogram()

    def update(self, values: Tensor) -> None:
        """Look at a tensor's values.

        Raises:
            ValueError: There is a NaN or an infinity among them.
        """
        self._histogram.update(values)

    def range(self) -> tuple[float, float]:
        """Return (low, high)."""
        histogram = self._histogram
        total = float(histogram.counts.sum())
        if not total:
            return 0.0, 0.0
        edges = torch.linspace(-histogram.limit, histogram.limit, len(histogram.counts) + 1, dtype=torch.float64)
        below = histogram.counts.cumsum(0)
        tail = (1 - self._share) * total
        low = edges[int(torch.searchsorted(below, tail, right=True).clamp(max=len(below) - 1))]
        high = edges[int(torch.searchsorted(below, total - tail).clamp(max=len(below) - 1)) + 1]
        return max(float(low), histogram.minimum), min(float(high), histogram.maximum)
