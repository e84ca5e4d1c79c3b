"""Boosted trees that learn an architecture's rank: neither units nor outliers of the quality matter."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field
from sklearn.ensemble import GradientBoostingRegressor  # type: ignore[import-untyped]

from mil_cli.assess.predictors.bagging import Regression, bag
from mil_cli.assess.predictors.base import Fitted, PredictorConfig
from mil_cli.assess.predictors.scaling import Scaling
from mil_cli.assess.predictors.targets import fitted_to
from mil_cli.assess.ranking import Floats


class Boosting(PredictorConfig):
    """Gradient boosting on the normal score of each architecture's rank, bagged for its uncertainty.

    Friedman 2001, "Greedy function approximation: a gradient boosting machine".

    Attributes:
        trees: Of each fit.
        depth: Of each tree.
        learning_rate: Share of each tree that is added.
        subsample: Share of the architectures that each tree sees.
        members: Fits to resampled architectures, whose spread is the uncertainty.
    """

    method: Literal["boosting"] = "boosting"
    trees: int = Field(60, ge=1, le=5000)
    depth: int = Field(3, ge=1, le=20)
    learning_rate: float = Field(0.1, gt=0, le=1)
    subsample: float = Field(0.8, gt=0, le=1)
    members: int = Field(8, ge=2, le=500)

    def fit(self, features: Floats, values: Floats, seed: int) -> Fitted:
        """Learn from trained architectures."""
        return fitted_to(
            values, lambda scores: bag(self._regression, features, scores, members=self.members, seed=seed)
        )

    def _regression(self, features: Floats, scores: Floats, seed: int) -> Regression:
        scaling = Scaling.of(features)
        trees = GradientBoostingRegressor(
            n_estimators=self.trees,
            max_depth=self.depth,
            learning_rate=self.learning_rate,
            subsample=self.subsample,
            random_state=seed,
        ).fit(scaling(features), scores)
        return lambda asked: np.asarray(trees.predict(scaling(asked)))
