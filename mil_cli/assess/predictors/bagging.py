"""Many fits to resampled architectures: their mean, and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mil_cli.assess.predictors.base import Prediction
from mil_cli.assess.ranking import Floats
from mil_cli.assess.table import Ints

Regression: TypeAlias = Callable[[Floats], Floats]
"""Features of shape (architectures, features) -> values of shape (architectures,)."""


def resampled(count: int, generator: np.random.Generator) -> Ints:
    """Return as many rows as there are, drawn with replacement; two different ones at least."""
    while True:
        rows = generator.integers(count, size=count)
        if count < 2 or (rows != rows[0]).any():
            return rows


@dataclass(frozen=True, eq=False)
class Bag:
    """Regressions that were fitted to resampled architectures.

    Attributes:
        regressions: The fits.
        noise: Mean squared error on architectures that a fit had not seen.
    """

    regressions: tuple[Regression, ...]
    noise: float

    def predict(self, features: Floats) -> Prediction:
        """Return the mean of the fits; their variance and the noise add up to that of one training."""
        found = np.stack([regression(features) for regression in self.regressions])
        return Prediction(found.mean(axis=0), np.sqrt(found.var(axis=0) + self.noise))


def bag(
    fit: Callable[[Floats, Floats, int], Regression], features: Floats, values: Floats, *, members: int, seed: int
) -> Bag:
    """Fit to resampled architectures.

    Breiman 1996, "Bagging predictors". The error of an architecture is that of the mean of those fits that had not
    drawn it.

    Args:
        fit: (features, values, seed) -> a regression.
        features: Shape (architectures, features).
        values: Shape (architectures,).
        members: How many fits.
        seed: Of the draws and the fits.
    """
    generator = np.random.default_rng(seed)
    regressions = []
    sums, counts = np.zeros(len(values)), np.zeros(len(values))
    for _ in range(members):
        rows = resampled(len(values), generator)
        regression = fit(features[rows], values[rows], int(generator.integers(2**31)))
        unseen = np.setdiff1d(np.arange(len(values)), rows)
        if len(unseen):
            sums[unseen] += regression(features[unseen])
            counts[unseen] += 1
        regressions.append(regression)
    met = counts > 0
    noise = float(np.mean((sums[met] / counts[met] - values[met]) ** 2)) if met.any() else float(values.var())
    return Bag(tuple(regressions), noise)
