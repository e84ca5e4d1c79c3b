"""The mean of several predictors, each wrong in its own way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import numpy as np
from pydantic import Field

from mil_cli.assess.predictors.base import Fitted, Prediction, PredictorConfig
from mil_cli.assess.predictors.boosting import Boosting
from mil_cli.assess.predictors.gaussian_process import GaussianProcess
from mil_cli.assess.predictors.pairwise import Pairwise
from mil_cli.assess.predictors.ridge import Ridge
from mil_cli.assess.predictors.targets import fitted_to
from mil_cli.assess.ranking import Floats

Single: TypeAlias = Annotated[Ridge | Boosting | GaussianProcess | Pairwise, Field(discriminator="method")]
"""A predictor that is no ensemble."""


class Ensemble(PredictorConfig):
    """Several predictors as an equal mixture.

    The deviation has what each is unsure of and how far they are apart, by the law of total variance (Lakshminarayanan
    et al. 2017, "Simple and scalable predictive uncertainty estimation using deep ensembles", NeurIPS).

    Attributes:
        members: The predictors.
    """

    method: Literal["ensemble"] = "ensemble"
    members: tuple[Single, ...] = Field((Ridge(), Boosting(), GaussianProcess(), Pairwise()), min_length=2)

    def fit(self, features: Floats, values: Floats, seed: int) -> Fitted:
        """Learn from trained architectures, each member on the scale of normal scores."""
        return fitted_to(
            values, lambda scores: FittedEnsemble(tuple(each.fit(features, scores, seed) for each in self.members))
        )


@dataclass(frozen=True, eq=False)
class FittedEnsemble:
    """Predictors that were fitted.

    Attributes:
        members: Each of them.
    """

    members: tuple[Fitted, ...]

    def predict(self, features: Floats) -> Prediction:
        """Return mean and deviation of the mixture."""
        found = [member.predict(features) for member in self.members]
        means = np.stack([each.mean for each in found])
        within = np.mean([each.deviation**2 for each in found], axis=0)
        return Prediction(means.mean(axis=0), np.sqrt(within + means.var(axis=0)))


AnyPredictor: TypeAlias = Annotated[
    Ridge | Boosting | GaussianProcess | Pairwise | Ensemble, Field(discriminator="method")
]
"""The predictors that settings may name."""
