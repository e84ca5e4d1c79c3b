"""Observers watch the values at one place of a graph during calibration and say which range its codes should span."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from mil_cli.stages.quantize.observers.entropy import Entropy
from mil_cli.stages.quantize.observers.min_max import MinMax
from mil_cli.stages.quantize.observers.moving_average import MovingAverage
from mil_cli.stages.quantize.observers.mse import MeanSquaredError
from mil_cli.stages.quantize.observers.percentile import Percentile
from mil_cli.stages.quantize.ranges import CodeRange

ObserverName = Literal["min_max", "moving_average", "percentile", "mse", "entropy"]


class Statistic(Protocol):
    """Sees every calibration batch once, in bounded memory."""

    def update(self, values: Tensor) -> None:
        """Look at a tensor's values; raises ValueError if one is NaN or infinite."""


class Observer(Statistic, Protocol):
    """Knows the range of what it saw."""

    def range(self) -> tuple[float, float]:
        """Return (low, high)."""
        ...


def make_observer(name: ObserverName, *, codes: CodeRange, percentile: float) -> Observer:
    """Return a fresh observer of the given kind."""
    match name:
        case "min_max":
            return MinMax()
        case "moving_average":
            return MovingAverage()
        case "percentile":
            return Percentile(percentile)
        case "mse":
            return MeanSquaredError(codes)
        case "entropy":
            return Entropy(codes)
