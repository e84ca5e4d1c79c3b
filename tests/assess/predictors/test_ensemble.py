"""Ensembles: the law of total variance, and their settings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from mil_cli.assess.predictors.base import Prediction
from mil_cli.assess.predictors.ensemble import AnyPredictor, Ensemble, FittedEnsemble
from mil_cli.assess.predictors.gaussian_process import GaussianProcess
from mil_cli.assess.predictors.pairwise import Pairwise
from mil_cli.assess.predictors.ridge import Ridge
from mil_cli.assess.ranking import tau_b


@dataclass
class Known:
    mean: float
    deviation: float

    def predict(self, features: np.ndarray) -> Prediction:
        return Prediction(np.full(len(features), self.mean), np.full(len(features), self.deviation))


def test_mean_and_deviation_are_those_of_what_the_mixture_draws() -> None:
    members = (Known(0.0, 1.0), Known(4.0, 0.5), Known(1.0, 2.0))
    mean, deviation = FittedEnsemble(members).predict(np.zeros((1, 1)))
    generator = np.random.default_rng(0)
    drawn = np.concatenate([generator.normal(each.mean, each.deviation, 200_000) for each in members])
    assert mean[0] == pytest.approx(drawn.mean(), abs=0.01)
    assert deviation[0] == pytest.approx(drawn.std(), abs=0.01)


def test_it_fits_its_members() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(50, 3))
    values = features[:, 0] + 0.1 * generator.normal(size=50)
    members = (Ridge(), GaussianProcess(), Pairwise())
    fitted = Ensemble(members=members).fit(features, values, 3)
    means = [member.fit(features, fitted.targets.scores, 3).predict(features).mean for member in members]
    np.testing.assert_allclose(fitted.fitted.predict(features).mean, np.mean(means, axis=0))
    assert tau_b(fitted.predict(features).mean, values) > 0.8


def test_settings_name_a_predictor_and_nothing_else() -> None:
    settings = TypeAdapter(AnyPredictor)
    assert settings.validate_python({"method": "ridge"}) == Ridge()
    nested = {"method": "ensemble", "members": [{"method": "ridge"}, {"method": "pairwise", "penalty": 2}]}
    assert settings.validate_python(nested) == Ensemble(members=(Ridge(), Pairwise(penalty=2)))
    for wrong in ({"method": "oracle"}, {"method": "ridge", "depth": 2}, {**nested, "members": [{"method": "ridge"}]}):
        with pytest.raises(ValidationError):
            settings.validate_python(wrong)
