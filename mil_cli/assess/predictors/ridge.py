"""Ridge regression: linear in the features, with a closed form for what it is unsure of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat
from sklearn.linear_model import RidgeCV  # type: ignore[import-untyped]

from mil_cli.assess.predictors.base import Fitted, Prediction, PredictorConfig
from mil_cli.assess.predictors.scaling import Scaling
from mil_cli.assess.predictors.targets import Target, fitted_to
from mil_cli.assess.ranking import Floats


class Ridge(PredictorConfig):
    """Ridge regression whose penalty is chosen by leaving out one architecture after another.

    Hoerl and Kennard 1970, "Ridge regression". The deviation is that of the Bayesian posterior under the prior that the
    penalty stands for, with the noise of one training.

    Attributes:
        penalties: Those that are tried, on features of deviation 1.
        target: What is learned: ``rank``, or ``value`` where values are about normal and a line fits them.
    """

    method: Literal["ridge"] = "ridge"
    penalties: tuple[PositiveFloat, ...] = Field(tuple(10.0**power for power in range(-2, 5)), min_length=1)

    target: Target = "rank"

    def fit(self, features: Floats, values: Floats, seed: int) -> Fitted:
        """Learn from trained architectures; nothing is drawn."""
        return fitted_to(values, lambda targets: self._regression(features, targets), target=self.target)

    def _regression(self, features: Floats, values: Floats) -> FittedRidge:
        scaling = Scaling.of(features)
        scaled = scaling(features)
        regression = RidgeCV(alphas=list(self.penalties)).fit(scaled, values)
        precision = scaled.T @ scaled + regression.alpha_ * np.eye(scaled.shape[1])
        covariance = np.linalg.inv(precision)
        freedom = len(values) - 1 - float(np.sum((scaled @ covariance) * scaled))
        left = values - regression.predict(scaled)
        noise = float(left @ left) / max(freedom, 1.0)
        return FittedRidge(scaling, regression, covariance, noise, len(values))


@dataclass(frozen=True, eq=False)
class FittedRidge:
    """A ridge regression that was fitted.

    Attributes:
        scaling: Of the features.
        regression: The fitted one.
        covariance: Of the weights, over the noise's variance, shape (features, features).
        noise: Variance of one training.
        count: Architectures that were seen.
    """

    scaling: Scaling
    regression: Any
    covariance: Floats
    noise: float
    count: int

    def predict(self, features: Floats) -> Prediction:
        """Return the posterior's mean and deviation."""
        scaled = self.scaling(features)
        unsure = np.sum((scaled @ self.covariance) * scaled, axis=1) + 1 / self.count
        return Prediction(self.regression.predict(scaled), np.sqrt(self.noise * (1 + unsure)))
