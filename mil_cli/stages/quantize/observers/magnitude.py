"""Observes the mean magnitude of values."""

from __future__ import annotations

from torch import Tensor


class MeanMagnitude:
    """The mean of ``|x|`` over everything seen."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    @property
    def mean(self) -> float:
        """The mean; 0 if nothing was seen."""
        return self._sum / self._count if self._count else 0.0

    def update(self, values: Tensor) -> None:
        """Look at a tensor's values."""
        self._sum += float(values.detach().abs().double().sum())
        self._count += values.numel()
