"""The Gaussian process against the textbook's posterior."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from mil_cli.assess.predictors.gaussian_process import GaussianProcess
from mil_cli.assess.ranking import tau_b


def test_the_posterior_is_the_textbooks() -> None:
    """Rasmussen and Williams 2006, equations 2.25, 2.26 and 4.17."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(25, 3))
    values = 10 + np.sin(features[:, 0]) + features[:, 1] ** 2 + 0.1 * generator.normal(size=25)
    asked = generator.normal(size=(6, 3))
    fitted = GaussianProcess(target="value").fit(features, values, 0)
    mean, deviation = fitted.predict(asked)

    kernel = fitted.process.kernel_
    variance, noise = kernel.k1.k1.constant_value, kernel.k2.noise_level
    x, x_asked = ((each - features.mean(axis=0)) / features.std(axis=0) for each in (features, asked))

    def covariance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        distance = np.sqrt(5) * cdist(first, second) / kernel.k1.k2.length_scale
        return variance * (1 + distance + distance**2 / 3) * np.exp(-distance)

    inverse = np.linalg.inv(covariance(x, x) + (noise + 1e-10) * np.eye(25))
    between = covariance(x_asked, x)
    spread = values.std()
    expected = values.mean() + spread * between @ inverse @ ((values - values.mean()) / spread)
    left = variance + noise - np.einsum("ij,jk,ik->i", between, inverse, between)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    np.testing.assert_allclose(deviation, spread * np.sqrt(left), rtol=1e-5)


def test_it_is_unsure_where_nothing_similar_was_trained() -> None:
    generator = np.random.default_rng(0)
    features = generator.uniform(-1, 1, size=(40, 2))
    fitted = GaussianProcess(target="value").fit(features, np.sin(3 * features[:, 0]), 0)
    _, deviation = fitted.predict(np.array([[0.0, 0.0], [9.0, 9.0]]))
    assert deviation[1] > 5 * deviation[0]


def test_it_learns_what_is_not_linear_and_constant_values_too() -> None:
    generator = np.random.default_rng(0)
    features = generator.uniform(-1, 1, size=(120, 2))
    values = -np.sum(features**2, axis=1)
    fitted = GaussianProcess().fit(features[:60], values[:60], 0)
    assert tau_b(fitted.predict(features[60:]).mean, values[60:]) > 0.9
    mean, _ = GaussianProcess().fit(features, np.full(120, 0.5), 0).predict(features)
    np.testing.assert_allclose(mean, 0.5)
