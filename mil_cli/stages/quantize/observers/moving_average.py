"""Observes a moving average of each batch's smallest and largest value: a single outlier counts for one batch only."""

from __future__ import annotations

from torch import Tensor

from mil_cli.stages.quantize.observers.min_max import MinMax

_DECAY = 0.9


class MovingAverage:
    """The exponential moving average of the ranges of batches, as in Jacob et al. (2018, arXiv:1712.05877).

    A batch weighs 0.9 times what the next one weighs. The weights are normalised (as Adam's), so that the first batch
    does not count for more than its share where there are few.
    """

    def __init__(self) -> None:
        self._low = self._high = self._weight = 0.0

    def update(self, values: Tensor) -> None:
        """Look at a tensor's values.

        Raises:
            ValueError: There is a NaN or an infinity among them.
        """
        if not values.numel():
            return
        batch = MinMax()
        batch.update(values)
        low, high = batch.range()
        self._low = _DECAY * self._low + (1 - _DECAY) * low
        self._high = _DECAY * self._high + (1 - _DECAY) * high
        self._weight = _DECAY * self._weight + (1 - _DECAY)

    def range(self) -> tuple[float, float]:
        """Return (low, high)."""
        return (self._low / self._weight, self._high / self._weight) if self._weight else (0.0, 0.0)
