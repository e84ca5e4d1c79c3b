"""Pairs: a published tournament, the closed form of two players, and what does not depend on units."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mil_cli.assess.predictors.pairwise import Pairwise, bradley_terry
from mil_cli.assess.ranking import tau_b

TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")

# Agresti, Categorical Data Analysis, 10.6: the American League's eastern division in 1987, wins of the row.
WINS = np.array(
    [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ]
)

# Of the R package BradleyTerry2, in its vignette on these data.
STRENGTHS = (1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0)


def test_a_known_tournament_has_its_published_strengths() -> None:
    pairs = list(itertools.permutations(range(len(TEAMS)), 2))
    differences = np.array([np.eye(len(TEAMS))[first] - np.eye(len(TEAMS))[second] for first, second in pairs])
    counts = np.array([float(WINS[pair]) for pair in pairs])
    found = bradley_terry(differences, counts, penalty=1e-6)
    np.testing.assert_allclose(found - found[-1], STRENGTHS, atol=2e-3)


def test_two_players_have_the_logarithm_of_their_odds() -> None:
    found = bradley_terry(np.array([[1.0], [-1.0]]), np.array([9.0, 3.0]), penalty=1e-9)
    assert found[0] == pytest.approx(math.log(3), rel=1e-4)


def test_the_penalty_is_half_the_squared_weights() -> None:
    """One pair: log(sigmoid(w)) - penalty * w^2 / 2 has its maximum where sigmoid(-w) = penalty * w."""
    (weight,) = bradley_terry(np.array([[1.0]]), np.array([1.0]), penalty=0.5)
    assert 1 / (1 + math.exp(weight)) == pytest.approx(0.5 * weight, rel=1e-4)


def test_only_the_order_of_what_was_trained_counts() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(90, 3))
    values = features @ [2.0, 1.0, 0.0] + 0.3 * generator.normal(size=90)
    plain = Pairwise().fit(features[:40], values[:40], 0)
    bent = Pairwise().fit(features[:40], np.exp(3 * values[:40]), 0)
    np.testing.assert_array_equal(plain.fitted.weights, bent.fitted.weights)
    assert tau_b(plain.predict(features[40:]).mean, bent.predict(features[40:]).mean) == 1
    assert tau_b(plain.predict(features[40:]).mean, values[40:]) > 0.7


def test_means_and_deviations_are_in_units_of_the_values() -> None:
    generator = np.random.default_rng(1)
    features = generator.normal(size=(400, 3))
    values = 100 + features @ [2.0, 1.0, 0.0] + 2 * generator.normal(size=400)
    mean, deviation = Pairwise().fit(features[:100], values[:100], 0).predict(features[100:])
    assert mean.mean() == pytest.approx(100, abs=0.5)
    assert np.std((values[100:] - mean) / deviation) == pytest.approx(1, abs=0.15)
    assert stats.linregress(mean, values[100:]).slope == pytest.approx(1, abs=0.25)


def test_ties_are_no_pairs_and_many_pairs_are_drawn_from() -> None:
    features = np.arange(12.0).reshape(-1, 1)
    mean, deviation = Pairwise().fit(features, np.ones(12), 0).predict(features)
    np.testing.assert_allclose(mean, 1)
    np.testing.assert_allclose(deviation, 0)
    few, others = (Pairwise(pairs=10).fit(features, features[:, 0], seed).fitted.weights for seed in (0, 1))
    assert few[0] > 0
    assert few[0] != others[0]
