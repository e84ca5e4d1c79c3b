"""Normal scores of ranks, and the way back to values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mil_cli.assess.predictors.base import Prediction, Predictor
from mil_cli.assess.predictors.gaussian_process import GaussianProcess
from mil_cli.assess.predictors.pairwise import Pairwise
from mil_cli.assess.predictors.ridge import Ridge
from mil_cli.assess.predictors.targets import NormalScores
from mil_cli.assess.ranking import tau_b


def test_scores_are_quantiles_of_the_normal_and_lead_back() -> None:
    values = np.random.default_rng(0).exponential(size=50)
    targets = NormalScores.of(values)
    ranks = np.argsort(np.argsort(values))
    np.testing.assert_allclose(targets.scores, stats.norm.ppf((ranks + 0.5) / 50))
    mean, deviation = targets.back(Prediction(np.linspace(-6, 6, 200), np.zeros(200)))
    assert (np.diff(mean) > 0).all()
    np.testing.assert_array_equal(deviation, 0)
    middle = targets.back(Prediction(np.zeros(1), np.ones(1))).mean[0]
    assert middle == pytest.approx(np.median(values), abs=0.2)


def test_of_normal_values_means_and_deviations_are_scaled() -> None:
    values = 5 + 2 * stats.norm.ppf((np.arange(400) + 0.5) / 400)
    mean, deviation = NormalScores.of(values).back(Prediction(np.array([-4.0, 0.3, 4.0]), np.full(3, 0.5)))
    np.testing.assert_allclose(mean, [-3, 5.6, 13], rtol=5e-3)  # beyond what was seen too
    np.testing.assert_allclose(deviation, 1, rtol=5e-3)


def test_equal_values_are_one_score_and_a_single_value_stays() -> None:
    targets = NormalScores.of(np.array([1.0, 1.0, 3.0]))
    assert targets.scores[0] == targets.scores[1] < targets.scores[2]
    mean, deviation = NormalScores.of(np.ones(4)).back(Prediction(np.array([-3.0, 3.0]), np.ones(2)))
    np.testing.assert_array_equal([mean, deviation], [[1, 1], [0, 0]])


@pytest.mark.parametrize("predictor", [Ridge(), GaussianProcess(restarts=0), Pairwise()])
def test_trainings_that_went_badly_do_not_disturb_the_order(predictor: Predictor) -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(160, 4))
    values = features @ [1.0, 0.5, 0.0, 0.0] + 0.2 * generator.normal(size=160)
    bad = values.copy()
    bad[values < np.quantile(values, 0.05)] -= 1000.0
    found = predictor.fit(features[:60], bad[:60], 0).predict(features[60:]).mean
    assert tau_b(found, values[60:]) > 0.75
