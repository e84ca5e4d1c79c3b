"""Boosted trees that learn an architecture's rank: neither units nor outliers of the quality matter."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field
from scipy.special import ndtri
from scipy.stats import rankdata
from sklearn.ensemble import GradientBoostingRegressor  # type: ignore[import-untyped]

from mil_cli.assess.predictors.bagging import Bag, Regression, bag
from mil_cli.assess.predictors.base import PredictorConfig
from mil_cli.assess.predictors.scaling import Scaling
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

    def fit(self, features: Floats, values: Floats, seed: int) -> Bag:
        """Learn from trained architectures."""
        return bag(self._fit, features, values, members=self.members, seed=seed)

    def _fit(self, features: Floats, values: Floats, seed: int) -> Regression:
        scores = ndtri((rankdata(values) - 0.5) / len(values))
        scaling = Scaling.of(features)
        trees = GradientBoostingRegressor(
            n_estimators=self.trees,
            max_depth=self.depth,
            learning_rate=self.learning_rate,
            subsample=self.subsample,
            random_state=seed,
        ).fit(scaling(features), scores)
        known, first = np.unique(scores, return_index=True)
        return lambda asked: np.interp(trees.predict(scaling(asked)), known, values[first])
