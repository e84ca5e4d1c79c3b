"""Boosted trees on ranks: interactions, units, and bounds."""

from __future__ import annotations

import numpy as np
import pytest

from mil_cli.assess.predictors.boosting import Boosting
from mil_cli.assess.predictors.ridge import Ridge
from mil_cli.assess.ranking import tau_b

Floats = np.ndarray


@pytest.fixture
def interaction() -> tuple[Floats, Floats]:
    generator = np.random.default_rng(0)
    features = generator.uniform(-1, 1, size=(200, 2))
    return features, features[:, 0] * features[:, 1] + 0.02 * generator.normal(size=200)


def test_interactions_are_learned_that_no_line_sees(interaction: tuple[Floats, Floats]) -> None:
    features, values = interaction
    trees, line = (each.fit(features[:100], values[:100], 0) for each in (Boosting(members=4), Ridge()))
    assert tau_b(trees.predict(features[100:]).mean, values[100:]) > 0.6
    assert abs(tau_b(line.predict(features[100:]).mean, values[100:])) < 0.3


def test_only_the_order_of_what_was_trained_counts(interaction: tuple[Floats, Floats]) -> None:
    features, values = interaction
    plain, bent = (
        Boosting(members=2).fit(features[:100], each, 0) for each in (values[:100], np.exp(5 * values[:100]))
    )
    np.testing.assert_array_equal(plain.fitted.predict(features).mean, bent.fitted.predict(features).mean)


def test_equal_values_are_one_rank() -> None:
    features = np.arange(20.0).reshape(-1, 1)
    values = np.repeat([0.2, 0.7], 10)
    mean, _ = Boosting(members=4).fit(features, values, 0).predict(features[[0, 19]])
    np.testing.assert_allclose(mean, [0.2, 0.7], atol=0.1)
    mean, deviation = Boosting(members=2).fit(features, np.ones(20), 0).predict(features)
    np.testing.assert_allclose(mean, 1)
    np.testing.assert_allclose(deviation, 0)
