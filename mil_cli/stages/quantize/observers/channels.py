"""Statistics of each channel of a value."""

from __future__ import annotations

import torch
from torch import Tensor


class ChannelMagnitude:
    """The largest ``|x|`` of each channel.

    Args:
        axis: The axis of the channels.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self.largest = torch.zeros((), dtype=torch.float64)
        """float64 ``[channels]`` once something was seen."""

    def update(self, values: Tensor) -> None:
        """Look at a tensor's values.

        Raises:
            ValueError: There is a NaN or an infinity among them.
        """
        if values.numel():
            rows = _rows(values, self._axis)
            self.largest = torch.maximum(self.largest, rows.abs().amax(1).double())


class ChannelMean:
    """The mean of each channel.

    Args:
        axis: The axis of the channels.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._sum = torch.zeros((), dtype=torch.float64)
        self._count = 0

    @property
    def mean(self) -> Tensor:
        """float64 ``[channels]`` once something was seen."""
        return self._sum / max(self._count, 1)

    def update(self, values: Tensor) -> None:
        """Look at a tensor's values.

        Raises:
            ValueError: There is a NaN or an infinity among them.
        """
        rows = _rows(values, self._axis)
        self._sum = self._sum + rows.sum(1, dtype=torch.float64)
        self._count += rows.shape[1]


def _rows(values: Tensor, axis: int) -> Tensor:
    """Return values as ``[channels, rest]``."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError("NaN or infinity among the values")
    return values.detach().movedim(axis, 0).reshape(values.shape[axis], -1)
