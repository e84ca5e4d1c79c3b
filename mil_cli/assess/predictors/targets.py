"""What predictors learn: ranks, on a scale on which trainings that went badly are no outliers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

from mil_cli.assess.predictors.base import Fitted, Prediction
from mil_cli.assess.ranking import Floats

Target: TypeAlias = Literal["rank", "value"]
"""What is learned: the normal score of the rank, or the value itself."""

_BANDWIDTH = 0.5  # of the smoothing, in deviations
_TILT = 1e-3  # deviations of the values for each of the scores: no two scores are to stand for the same value
_BEYOND = 10.0  # deviations, beyond all predictions


@dataclass(frozen=True, eq=False)
class NormalScores:
    """Values as the normal scores of their ranks (van der Waerden 1952), and back.

    The way back is a smooth curve (local linear regression, Fan 1992), since the gaps between single values are chance.

    Attributes:
        scores: Of the values, in their order.
        places: The different scores, ascending, with one more at either end to extrapolate.
        values: What they stand for.
    """

    scores: Floats
    places: Floats
    values: Floats

    @classmethod
    def of(cls, values: Floats) -> Self:
        """Return the scores of values, shape (architectures,); equal values have the same."""
        scores = ndtri((rankdata(values) - 0.5) / len(values))
        places = np.unique(scores)
        reached, slopes = _smooth(places, scores, values)
        return cls(
            scores,
            np.concatenate([places[:1] - _BEYOND, places, places[-1:] + _BEYOND]),
            np.concatenate([reached[:1] - _BEYOND * slopes[0], reached, reached[-1:] + _BEYOND * slopes[-1]]),
        )

    def back(self, prediction: Prediction) -> Prediction:
        """Return in values what is thought of scores: what the mean stands for, and a deviation to either side."""
        low, middle, high = (
            np.interp(prediction.mean + side * prediction.deviation, self.places, self.values) for side in (-1, 0, 1)
        )
        return Prediction(middle, (high - low) / 2)


@dataclass(frozen=True, eq=False)
class FittedToScores:
    """A predictor that was fitted to normal scores, and answers in values.

    Attributes:
        fitted: The predictor.
        targets: The scores.
    """

    fitted: Fitted
    targets: NormalScores

    def predict(self, features: Floats) -> Prediction:
        """Return what is thought of architectures, in values."""
        return self.targets.back(self.fitted.predict(features))


def fitted_to(values: Floats, fit: Callable[[Floats], Fitted], *, target: Target = "rank") -> Fitted:
    """Return a predictor that learned ranks or values, and answers in values.

    Args:
        values: What training reached, shape (architectures,).
        fit: What is learned -> a predictor of it.
        target: What is learned.
    """
    if target == "value":
        return fit(values)
    targets = NormalScores.of(values)
    return FittedToScores(fit(targets.scores), targets)


def _smooth(places: Floats, scores: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Return level and slope of a rising curve through values, at some places, each of shape (places,)."""
    apart = scores - places[:, None]
    weights = np.exp(-0.5 * (apart / _BANDWIDTH) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    centre, level = (weights * apart).sum(axis=1), weights @ values
    spread = (weights * (apart - centre[:, None]) ** 2).sum(axis=1)
    slopes = (weights * (apart - centre[:, None]) * (values - level[:, None])).sum(axis=1)
    slopes = np.maximum(0.0, slopes / np.where(spread > 0, spread, np.inf))
    tilt = _TILT * values.std()
    return np.maximum.accumulate(level - slopes * centre) + tilt * places, slopes + tilt
