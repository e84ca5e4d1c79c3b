"""Features as predictors read them: gaps, overflows and orders of magnitude."""

from __future__ import annotations

import numpy as np

from mil_cli.assess.predictors.scaling import Scaling


def test_ordinary_features_are_standardised() -> None:
    features = np.random.default_rng(0).normal(3.0, 5.0, size=(100, 2))
    scaled = Scaling.of(features)(features)
    np.testing.assert_allclose(scaled, (features - features.mean(axis=0)) / features.std(axis=0))


def test_features_of_many_orders_of_magnitude_become_even_and_keep_their_order() -> None:
    powers = np.linspace(-300, 300, 61)
    features = np.column_stack([10.0**powers, -(10.0**powers)])
    scaled = Scaling.of(features)(features)
    assert np.isfinite(scaled).all()
    assert (np.diff(scaled[:, 0]) >= 0).all()
    np.testing.assert_allclose(scaled[:, 1], -scaled[:, 0])
    upper = scaled[31:, 0]  # above the median it is the logarithm
    np.testing.assert_allclose(np.diff(upper), np.diff(upper)[0], rtol=1e-6)


def test_gaps_and_overflows_are_imputed_and_flagged() -> None:
    column = np.array([1.0, 2.0, 3.0, np.nan, np.inf, -np.inf])
    features = np.column_stack([column, np.arange(6.0)])
    scaling = Scaling.of(features)
    scaled = scaling(features)
    assert scaled.shape == (6, 3)
    np.testing.assert_allclose(scaled[3:, 0], scaled[[1, 2, 0], 0])  # median, largest, smallest
    assert set(scaled[:3, 2]) < set(scaled[:, 2])
    np.testing.assert_allclose(scaled[:, 2], [-1, -1, -1, 1, 1, 1])


def test_what_is_new_is_scaled_by_what_was_seen() -> None:
    seen = np.array([[1.0, 7.0], [3.0, 7.0]])
    scaling = Scaling.of(seen)
    asked = np.array([[np.inf, 7.0], [np.nan, 1e300], [5.0, np.nan]])
    np.testing.assert_allclose(scaling(asked), [[1, 0], [0, 0], [3, 0]])  # a constant column says nothing


def test_a_column_without_any_number_says_nothing() -> None:
    features = np.column_stack([np.full(4, np.nan), np.arange(4.0)])
    scaled = Scaling.of(features)(features)
    assert (scaled[:, [0, 2]] == 0).all()
    assert np.isfinite(scaled).all()


def test_numbers_too_large_to_square_are_no_overflow() -> None:
    features = np.array([[1.0e300], [1.5e300], [-1.7e308], [0.0]])
    scaled = Scaling.of(features)(features)
    assert np.isfinite(scaled).all()
    assert np.argsort(scaled[:, 0]).tolist() == [2, 3, 0, 1]
