"""A Gaussian process: smooth in the features, and unsure where nothing similar was trained."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field
from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
from sklearn.gaussian_process import GaussianProcessRegressor  # type: ignore[import-untyped]
from sklearn.gaussian_process.kernels import (  # type: ignore[import-untyped]
    ConstantKernel,
    Matern,
    WhiteKernel,
)

from mil_cli.assess.predictors.base import Fitted, Prediction, PredictorConfig, sklearn_seed
from mil_cli.assess.predictors.scaling import Scaling
from mil_cli.assess.predictors.targets import Target, fitted_to
from mil_cli.assess.ranking import Floats


class GaussianProcess(PredictorConfig):
    """Regression by a Gaussian process with a Matern kernel of 5/2 and noise; inputs and values of deviation 1.

    Rasmussen and Williams 2006, "Gaussian processes for machine learning", chapters 2 and 5. The kernel's parameters
    are those of the largest marginal likelihood. Takes time as the cube of the architectures.

    Attributes:
        restarts: Further starts of the search for these parameters, at random points.
        target: What is learned: ``rank``, or ``value`` where values are about normal.
    """

    method: Literal["gaussian_process"] = "gaussian_process"
    restarts: int = Field(1, ge=0, le=100)

    target: Target = "rank"

    def fit(self, features: Floats, values: Floats, seed: int) -> Fitted:
        """Learn from trained architectures."""
        return fitted_to(values, lambda targets: self._process(features, targets, seed), target=self.target)

    def _process(self, features: Floats, values: Floats, seed: int) -> FittedProcess:
        scaling = Scaling.of(features)
        scaled = scaling(features)
        size = math.sqrt(scaled.shape[1])  # about how far two architectures are apart
        kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(size, (0.1 * size, 100 * size), nu=2.5)
        process = GaussianProcessRegressor(
            kernel + WhiteKernel(0.1, (1e-5, 10.0)),
            normalize_y=True,
            n_restarts_optimizer=self.restarts,
            random_state=sklearn_seed(seed),
        )
        with warnings.catch_warnings():
            # a parameter at its bound says that features tell nothing, or that nothing is noise
            warnings.simplefilter("ignore", ConvergenceWarning)
            return FittedProcess(scaling, process.fit(scaled, values))


@dataclass(frozen=True, eq=False)
class FittedProcess:
    """A Gaussian process that was fitted.

    Attributes:
        scaling: Of the features.
        process: The fitted one.
    """

    scaling: Scaling
    process: Any

    def predict(self, features: Floats) -> Prediction:
        """Return the posterior's mean and deviation, with the noise."""
        mean, deviation = self.process.predict(self.scaling(features), return_std=True)
        return Prediction(mean, deviation)
