"""Observes the smallest and the largest value: nothing is ever clipped."""

from __future__ import annotations

import torch
from torch import Tensor


class MinMax:
    """The range of everything seen."""

    def __init__(self) -> None:
        self._low = float("inf")
        self._high = float("-inf")

    def update(self, values: Tensor) -> None:
        """Look at a tensor's values.

        Raises:
            ValueError: There is a NaN or an infinity among them.
        """
        if not values.numel():
            return
        low, high = (float(value) for value in torch.aminmax(values.detach()))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError("NaN or infinity among the values")
        self._low, self._high = min(self._low, low), max(self._high, high)

    def range(self) -> tuple[float, float]:
        """Return (low, high)."""
        return (self._low, self._high) if self._low <= self._high else (0.0, 0.0)
