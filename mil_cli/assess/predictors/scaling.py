"""Features as predictors read them: without overflows and gaps, on one scale.

Some scores without training span many orders of magnitude and overflow, such as SynFlow's products of all weights;
others fail for single architectures. What is done to them is learned from the architectures that a predictor is fitted
to, and from no others.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from mil_cli.assess.ranking import Floats
from mil_cli.assess.table import Bools

_SPAN = 10.0  # times the median: beyond all that normal, uniform or exponential features of some hundred rows reach
_LARGEST = 1e100  # whose square is still a number


@dataclass(frozen=True, eq=False)
class Scaling:
    """What is done to the features, each of shape (features,) but for the last two.

    Attributes:
        wide: Whether a feature spans orders of magnitude, so that its signed logarithm is taken.
        unit: The logarithm of the size up to which a wide feature stays linear.
        middle: What a missing number becomes: the median.
        low: What minus infinity becomes: the smallest that was seen.
        high: What infinity becomes: the largest.
        flagged: Whether a feature had a gap or an overflow; a further column says where.
        mean: Of all columns, with those that flag.
        deviation: Their standard deviation; infinite for a column that was constant, which says nothing.
    """

    wide: Bools
    unit: Floats
    middle: Floats
    low: Floats
    high: Floats
    flagged: Bools
    mean: Floats
    deviation: Floats

    @classmethod
    def of(cls, features: Floats) -> Self:
        """Return the scaling of architectures' features, shape (architectures, features)."""
        sizes = np.where(np.isfinite(features), np.abs(features), np.nan)
        unit = np.log(_columns(np.nanmedian, np.where(sizes > 0, sizes, np.nan), 1.0))
        largest = _columns(np.nanmax, sizes, 0.0)
        with np.errstate(divide="ignore"):
            wide = (np.log(largest) - unit > math.log(_SPAN)) | (largest > _LARGEST)
        logged = _logged(features, wide, unit)
        known = np.where(np.isfinite(logged), logged, np.nan)
        middle, low, high = (_columns(figure, known, 0.0) for figure in (np.nanmedian, np.nanmin, np.nanmax))
        flagged: Bools = np.logical_or.reduce(~np.isfinite(features), axis=0)
        filled = _filled(logged, middle, low, high, flagged)
        deviation = filled.std(axis=0)
        constant = np.ptp(filled, axis=0) == 0
        return cls(wide, unit, middle, low, high, flagged, filled.mean(axis=0), np.where(constant, np.inf, deviation))

    def __call__(self, features: Floats) -> Floats:
        """Return features of mean 0 and deviation 1, shape (architectures, features + flagged ones)."""
        logged = _logged(features, self.wide, self.unit)
        filled = _filled(logged, self.middle, self.low, self.high, self.flagged)
        scaled: Floats = (filled - self.mean) / self.deviation
        return scaled


def _columns(figure: Callable[..., Floats], values: Floats, otherwise: float) -> Floats:
    """Return a figure of each column that is blind to NaN, or another number for a column that has nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column without a number
        found = figure(values, axis=0)
    return np.where(np.isnan(found), otherwise, found)


def _logged(features: Floats, wide: Bools, unit: Floats) -> Floats:
    """Return the signed logarithm of the wide features: log(1 + size / unit), without overflow."""
    finite = np.isfinite(features)
    with np.errstate(divide="ignore"):
        sizes = np.log(np.abs(np.where(finite, features, 0.0)))
    return np.where(wide & finite, np.sign(features) * np.logaddexp(0.0, sizes - unit), features)


def _filled(logged: Floats, middle: Floats, low: Floats, high: Floats, flagged: Bools) -> Floats:
    odd = ~np.isfinite(logged)
    filled = np.where(np.isnan(logged), middle, np.where(odd, np.where(logged > 0, high, low), logged))
    return np.column_stack([filled, odd[:, flagged].astype(np.float64)])
