"""Observes the range whose codes keep most of the values' distribution: the least Kullback-Leibler divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mil_cli.stages.quantize.observers.histogram import Histogram
from mil_cli.stages.quantize.ranges import CodeRange

_CANDIDATES = 256


class Entropy:
    """The threshold with the least divergence, as in TensorRT (Migacz, 8-bit inference with TensorRT, 2017).

    Values beyond a threshold are counted at it; the divergence is that between this distribution and the same rounded
    to as many levels as there are codes. Both ends of a range that includes 0 share the threshold. Zeros are not
    counted: they have a code of their own, and the peak that a rectifier leaves there would outweigh all else.

    Args:
        codes: The codes that will span the range.
    """

    def __init__(self, codes: CodeRange) -> None:
        self._levels = codes.steps + 1
        self._histogram = Histogram()

    def update(self, values: Tensor) -> None:
        """Look at a tensor's values.

        Raises:
            ValueError: There is a NaN or an infinity among them.
        """
        self._histogram.update(values[values != 0])

    def range(self) -> tuple[float, float]:
        """Return (low, high)."""
        histogram = self._histogram
        if histogram.limit == 0.0:
            return 0.0, 0.0
        width, middle = histogram.bin_width, len(histogram.counts) // 2
        below, above = histogram.minimum < 0, histogram.maximum > 0
        # Fewer bins than levels would be kept as they are, and look better than they are.
        first = -(-self._levels // (below + above))
        last = max(min(math.ceil(max(-histogram.minimum, histogram.maximum) / width), middle), first)
        best, least = last, math.inf
        candidates = torch.logspace(math.log2(last), math.log2(first), _CANDIDATES, base=2).round().int()
        for bins in dict.fromkeys(candidates.tolist()):
            start, end = middle - bins * below, middle + bins * above
            found = divergence(histogram.counts, start, end, self._levels)
            if found < least:  # Equal divergence: the wider range, which clips less of what calibration did not show.
                best, least = bins, found
        return max(histogram.minimum, -best * width), min(histogram.maximum, best * width)


def divergence(counts: Tensor, start: int, end: int, levels: int) -> float:
    """Return the divergence between counts clipped to some bins and the same rounded to levels.

    Args:
        counts: float64 ``[bins]``.
        start: The first bin that is not clipped.
        end: The bin after the last that is not clipped.
        levels: How many levels share these bins evenly; a level's count is shared by those of its bins that have any.

    Returns:
        ``sum p log(p / q)``; infinite where a bin has counts that its level knows nothing of, and where all counts are
        clipped to a single bin, which no rounding could change.
    """
    kept = counts[start:end]
    clipped = kept.clone()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[end:].sum()
    level = torch.arange(len(kept)) * levels // len(kept)
    used = clipped > 0
    if int(used.sum()) < 2 or not bool(kept.any()):
        return math.inf
    share = torch.bincount(level, kept, levels) / torch.bincount(level, used.double(), levels)
    expanded = torch.where(used, share[level], 0.0)
    p, q = clipped / clipped.sum(), expanded / expanded.sum()
    return float(torch.special.xlogy(p[used], p[used] / q[used]).sum())
