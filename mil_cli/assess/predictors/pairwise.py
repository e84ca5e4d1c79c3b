"""Which of two architectures is better: learned from pairs, by the differences of their features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field
from scipy.special import expit
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

from mil_cli.assess.predictors.base import Fitted, Prediction, PredictorConfig
from mil_cli.assess.predictors.scaling import Scaling
from mil_cli.assess.predictors.targets import fitted_to
from mil_cli.assess.ranking import Floats


class Pairwise(PredictorConfig):
    """A Bradley-Terry model whose strengths are linear in the features.

    Bradley and Terry 1952, "Rank analysis of incomplete block designs: I. The method of paired comparisons". Only the
    order of the trained architectures is learned; others rank by their mean chance to win against each of these, and
    a line through the trained ones says what such a share of wins stands for.

    Attributes:
        penalty: Of the squared weights, on features of deviation 1; one architecture counts as one, in all its pairs.
        pairs: The most that are learned from; of more some are drawn.
    """

    method: Literal["pairwise"] = "pairwise"
    penalty: float = Field(0.3, gt=0)
    pairs: int = Field(20_000, ge=10)

    def fit(self, features: Floats, values: Floats, seed: int) -> Fitted:
        """Learn from trained architectures; two of equal value are no pair."""
        return fitted_to(values, lambda scores: self._model(features, scores, seed))

    def _model(self, features: Floats, scores: Floats, seed: int) -> FittedPairwise:
        scaling = Scaling.of(features)
        scaled = scaling(features)
        differences = self._differences(scaled, scores, seed)
        counts = np.full(len(differences), len(scores) / max(1, len(differences)))
        weights = bradley_terry(differences, counts, penalty=self.penalty)
        lost = expit(-differences @ weights)
        information = (differences.T * (counts * lost * (1 - lost))) @ differences
        inverse = np.linalg.inv(information + self.penalty * np.eye(len(weights)))
        covariance = inverse.astype(np.float64)
        strengths = scaled @ weights
        shares = _wins(strengths, strengths)[0]
        slope = float(np.cov(shares, scores)[0, 1] / max(shares.var(ddof=1), np.finfo(float).tiny))
        level = float(scores.mean() - slope * shares.mean())
        freedom = len(scores) - 1 - float(np.trace(information @ covariance))
        left = scores - level - slope * shares
        noise = float(left @ left) / max(freedom, 1.0)
        return FittedPairwise(scaling, weights, covariance, strengths, level, slope, noise)

    def _differences(self, scaled: Floats, values: Floats, seed: int) -> Floats:
        """Return the better one's features less the other's, shape (pairs, features)."""
        first, second = np.triu_indices(len(values), 1)
        unequal = np.flatnonzero(values[first] != values[second])
        if len(unequal) > self.pairs:
            unequal = np.random.default_rng(seed).choice(unequal, self.pairs, replace=False)
        first, second = first[unequal], second[unequal]
        sign = np.sign(values[first] - values[second])
        return sign[:, None] * (scaled[first] - scaled[second])


@dataclass(frozen=True, eq=False)
class FittedPairwise:
    """A Bradley-Terry model that was fitted.

    Attributes:
        scaling: Of the features.
        weights: Of a strength, shape (features,).
        covariance: Of the weights, by the curvature of the likelihood, shape (features, features).
        strengths: Those of the trained architectures.
        level: The normal score of one that never wins.
        slope: How much more one has that always wins.
        noise: Variance of the normal scores around this line.
    """

    scaling: Scaling
    weights: Floats
    covariance: Floats
    strengths: Floats
    level: float
    slope: float
    noise: float

    def predict(self, features: Floats) -> Prediction:
        """Return the score that the share of wins stands for, and what strength and noise leave open."""
        scaled = self.scaling(features)
        shares, steepness = _wins(scaled @ self.weights, self.strengths)
        unsure = np.sum((scaled @ self.covariance) * scaled, axis=1) * (self.slope * steepness) ** 2
        return Prediction(self.level + self.slope * shares, np.sqrt(unsure + self.noise))


def _wins(strengths: Floats, others: Floats) -> tuple[Floats, Floats]:
    """Return the mean chance to win against others, and its derivative by the strength."""
    chances = expit(strengths[:, None] - others)
    return chances.mean(axis=1), (chances * (1 - chances)).mean(axis=1)


def bradley_terry(differences: Floats, weights: Floats, *, penalty: float) -> Floats:
    """Return the weights of strengths under which the winners most likely win.

    Args:
        differences: The winner's features less the loser's, shape (pairs, features).
        weights: How much each pair counts, shape (pairs,).
        penalty: Half of it, times the squared weights, is subtracted from the logarithm of the likelihood.

    Returns:
        Shape (features,); zero if there is no pair.
    """
    if not len(differences):
        return np.zeros(differences.shape[1])
    both = np.vstack([differences, -differences])  # a won pair and the same pair lost: a classifier needs two classes
    won = np.repeat([1, 0], len(differences))
    regression = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-8, max_iter=1000)
    found: Floats = regression.fit(both, won, sample_weight=np.tile(weights / 2, 2)).coef_[0]
    return found
