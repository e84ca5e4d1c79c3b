"""How well a predictor predicts: only ever scored on architectures that it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri
from sklearn.model_selection import RepeatedKFold  # type: ignore[import-untyped]

from mil_cli.assess.predictors.base import Fitted, Prediction, Predictor, sklearn_seed
from mil_cli.assess.ranking import DRAWS, Floats, Interval, bootstrap, pooled_tau, regret, tau_b
from mil_cli.assess.table import Ints
from mil_cli.errors import DataError
from mil_cli.events import Progress, SilentProgress

FEWEST = 4
"""Trained architectures below which nothing can be said of a predictor: two folds of two."""

_CURVE_RANGE = (2.5, 97.5)


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """What a predictor thought of each architecture when it was fitted to others.

    Attributes:
        values: What training reached, shape (architectures,).
        mean: Shape (repeats, architectures).
        deviation: Likewise.
        folds: The number of the fold that each architecture was held out in, likewise.
    """

    values: Floats
    mean: Floats
    deviation: Floats
    folds: Ints

    def tau(self, *, seed: int, draws: int = DRAWS) -> Interval:
        """Return the agreement of the orders, with its interval over architectures.

        Only pairs count that were held out together: each fold's predictor was fitted to the rest, whose mean is the
        lower the better the fold is, so that folds are not comparable.
        """
        repeats, count = self.folds.shape
        groups = self.folds + np.arange(repeats)[:, None] * count

        def figure(chosen: Ints) -> float:
            truth = np.tile(self.values[chosen], repeats)
            return pooled_tau(self.mean[:, chosen].ravel(), truth, groups[:, chosen].ravel())

        return bootstrap(figure, count, seed=seed, draws=draws)

    @property
    def residuals(self) -> Floats:
        """How many deviations each value is off, shape (repeats, architectures)."""
        return np.abs(self.values - self.mean) / np.maximum(self.deviation, np.finfo(np.float64).tiny)

    def width(self, level: float) -> float:
        """Return how many deviations to either side hold a share of the values.

        Split conformal prediction with normalised residuals (Papadopoulos et al. 2002; Lei et al. 2018,
        "Distribution-free predictive inference for regression"), from held-out folds as in Barber et al. 2021,
        "Predictive inference with the jackknife+": no matter how wrong deviations are as a whole. With fewer than
        level / (1 - level) architectures it is the largest residual, which holds less.
        """
        return float(np.mean([_quantile(each, level) for each in self.residuals]))

    def coverage(self, level: float) -> float:
        """Return which share of the values such intervals hold; those of a fold by the residuals of the others."""
        held = [
            residuals[folds == fold] <= _quantile(residuals[folds != fold], level)
            for residuals, folds in zip(self.residuals, self.folds, strict=True)
            for fold in np.unique(folds)
        ]
        return float(np.concatenate(held).mean())


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A predictor that was fitted to all that was trained, with deviations that residuals of held-out ones bear out.

    Attributes:
        fitted: The predictor.
        held_out: What it thought of architectures that it was not fitted to.
        level: The share of values at which deviations are calibrated.
    """

    fitted: Fitted
    held_out: OutOfFold
    level: float = 0.9

    def predict(self, features: Floats) -> Prediction:
        """Return the mean, and the deviation of the normal distribution whose interval holds the share `level`."""
        mean, deviation = self.fitted.predict(features)
        return Prediction(mean, deviation * self.held_out.width(self.level) / ndtri((1 + self.level) / 2))


def out_of_fold(
    predictor: Predictor,
    features: Floats,
    values: Floats,
    *,
    folds: int,
    repeats: int,
    seed: int,
    progress: Progress | None = None,
) -> OutOfFold:
    """Fit to all folds but one, predict that one, and so on for each.

    Args:
        predictor: What is fitted, anew for each fold.
        features: Shape (architectures, features).
        values: What training reached, larger is better, shape (architectures,).
        folds: How many parts; fewer if there would be less than two architectures in each.
        repeats: How often architectures are shuffled anew.
        seed: Of the folds and the fits.
        progress: Where it is told.

    Raises:
        DataError: There are too few trained architectures.
    """
    count = len(values)
    if count < FEWEST:
        hint = f"train some more: {FEWEST} are the fewest, and 20 make a first ranking"
        raise DataError("too few architectures are trained to judge a predictor", value=count, hint=hint)
    folds = min(folds, count // 2)
    mean, deviation = np.empty((repeats, count)), np.empty((repeats, count))
    numbers = np.empty((repeats, count), dtype=np.int64)
    shuffled = RepeatedKFold(n_splits=folds, n_repeats=repeats, random_state=sklearn_seed(seed))
    with (progress or SilentProgress()).work("out of fold", folds * repeats) as bar:
        for number, (seen, held) in enumerate(shuffled.split(features)):
            repeat, fold = divmod(number, folds)
            mean[repeat, held], deviation[repeat, held] = predictor.fit(
                features[seen], values[seen], seed + number
            ).predict(features[held])
            numbers[repeat, held] = fold
            bar.advance()
    return OutOfFold(values, mean, deviation, numbers)


def calibrated(
    predictor: Predictor, features: Floats, values: Floats, held_out: OutOfFold, *, level: float, seed: int
) -> Calibrated:
    """Fit to all that was trained; how far to trust it comes from the folds.

    Args:
        predictor: What is fitted.
        features: Shape (architectures, features).
        values: Shape (architectures,).
        held_out: Of the same predictor and architectures.
        level: Share of values that intervals are to hold.
        seed: Of the fit.
    """
    return Calibrated(predictor.fit(features, values, seed), held_out, level)


@dataclass(frozen=True)
class CurvePoint:
    """What a predictor ranks after so many trainings.

    Attributes:
        trained: How many architectures it was fitted to.
        tau: Agreement with the order of the held-out ones: the mean of the repeats, and the range of 95 % of them.
        regret: How much better the best of the held-out ones is than the one that is ranked first, likewise.
    """

    trained: int
    tau: Interval
    regret: Interval


def learning_curve(
    predictor: Predictor,
    features: Floats,
    values: Floats,
    *,
    sizes: Sequence[int],
    repeats: int,
    seed: int,
    held_out: float = 0.3,
    progress: Progress | None = None,
) -> list[CurvePoint]:
    """Fit to ever more architectures and rank those that are always held out.

    Args:
        predictor: What is fitted.
        features: Shape (architectures, features).
        values: Shape (architectures,).
        sizes: How many architectures are fitted to; sizes that leave too few to hold out are left out.
        repeats: How often other architectures are held out.
        seed: Of these draws and the fits.
        held_out: Share of the architectures.
        progress: Where it is told.

    Raises:
        DataError: No size leaves enough.
    """
    count = len(values)
    held = max(2, math.ceil(held_out * count))
    possible = sorted({size for size in sizes if 2 <= size <= count - held})
    if not possible:
        hint = f"with {count} trained architectures, 2 to {count - held} can be fitted to"
        raise DataError("no point of the learning curve can be had", value=list(sizes), hint=hint)
    taus, regrets = np.empty((2, repeats, len(possible)))
    with (progress or SilentProgress()).work("learning curve", taus.size) as bar:
        for repeat in range(repeats):
            order = np.random.default_rng([seed, repeat]).permutation(count)
            asked = order[-held:]
            for place, size in enumerate(possible):
                fitted = predictor.fit(features[order[:size]], values[order[:size]], seed + repeat)
                scores = fitted.predict(features[asked]).mean
                taus[repeat, place] = tau_b(scores, values[asked])
                regrets[repeat, place] = regret(scores, values[asked])
                bar.advance()
    return [
        CurvePoint(size, _over_repeats(found), _over_repeats(missed))
        for size, found, missed in zip(possible, taus.T, regrets.T, strict=True)
    ]


def _over_repeats(figures: Floats) -> Interval:
    low, high = np.percentile(figures, _CURVE_RANGE)
    return Interval(float(figures.mean()), float(low), float(high))


def _quantile(residuals: Floats, level: float) -> float:
    """Return the residual that a share of new ones is at most, by the finite-sample rank of conformal prediction."""
    rank = min(len(residuals), math.ceil((len(residuals) + 1) * level))
    return float(np.sort(residuals)[rank - 1])
