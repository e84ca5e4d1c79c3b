"""Observes the range whose codes have the smallest squared error: clipping is weighed against rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from mil_cli.ops.learned_scale import SMALLEST_SCALE
from mil_cli.stages.quantize.observers.histogram import Histogram
from mil_cli.stages.quantize.ranges import CodeRange

_CANDIDATES = 100
_ROUNDS = 2


class MeanSquaredError:
    """The range that minimises ``sum (x - quantized(x))^2``, searched on a histogram.

    Both ends shrink together first, then each by itself, twice; a hundred candidates each time.

    Args:
        codes: The codes that will span the range: how fine they are decides how much clipping pays.
    """

    def __init__(self, codes: CodeRange) -> None:
        self._codes = codes
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
        seen = histogram.counts > 0
        if histogram.limit == 0.0:
            return 0.0, 0.0
        values = histogram.centers[seen].clamp(histogram.minimum, histogram.maximum)
        counts = histogram.counts[seen]
        low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
        shrink = torch.arange(1, _CANDIDATES + 1, dtype=torch.float64) / _CANDIDATES
        best = self._best(values, counts, low * shrink, high * shrink)
        for _ in range(_ROUNDS):
            lows = torch.cat([torch.tensor([best[0]], dtype=torch.float64), low * shrink])
            best = self._best(values, counts, lows, torch.full_like(lows, best[1]))
            highs = torch.cat([torch.tensor([best[1]], dtype=torch.float64), high * shrink])
            best = self._best(values, counts, torch.full_like(highs, best[0]), highs)
        return best

    def _best(self, values: Tensor, counts: Tensor, lows: Tensor, highs: Tensor) -> tuple[float, float]:
        errors = squared_errors(values, counts, lows, highs, self._codes)
        # Equal errors: the wider range, which clips less of what calibration did not show.
        index = len(errors) - 1 - int(errors.flip(0).argmin())
        return float(lows[index]), float(highs[index])


def squared_errors(values: Tensor, counts: Tensor, lows: Tensor, highs: Tensor, codes: CodeRange) -> Tensor:
    """Return the weighted squared error of rounding `values` under each candidate range.

    Args:
        values: float64 ``[bins]``.
        counts: How often each value occurs, ``[bins]``.
        lows: ``[candidates]``, at most 0.
        highs: ``[candidates]``, at least 0.
        codes: The codes that span each range.

    Returns:
        float64 ``[candidates]``.
    """
    scale = ((highs - lows) / codes.steps).clamp(min=SMALLEST_SCALE)[:, None]
    zero_point = (codes.quant_min - lows[:, None] / scale).round()
    rounded = (values / scale).round_() + zero_point
    rounded = (rounded.clamp_(codes.quant_min, codes.quant_max) - zero_point) * scale
    return ((rounded - values) ** 2) @ counts
