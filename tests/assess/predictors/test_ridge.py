"""Ridge regression against its closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge as Plain

from mil_cli.assess.predictors.ridge import Ridge

Floats = np.ndarray


@pytest.fixture
def problem() -> tuple[Floats, Floats]:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(30, 5))
    return features, features @ [3.0, 1.0, 0.0, 0.0, -2.0] + generator.normal(size=30)


def test_mean_and_deviation_are_the_posteriors(problem: tuple[Floats, Floats]) -> None:
    features, values = problem
    penalty = 3.0
    asked = np.random.default_rng(1).normal(size=(7, 5))
    mean, deviation = Ridge(penalties=(penalty,), target="value").fit(features, values, 0).predict(asked)

    x, x_asked = ((each - features.mean(axis=0)) / features.std(axis=0) for each in (features, asked))
    kernel = np.linalg.inv(x @ x.T + penalty * np.eye(30))  # the dual form
    centred = values - values.mean()
    np.testing.assert_allclose(mean, values.mean() + x_asked @ x.T @ kernel @ centred)
    left = centred - x @ x.T @ kernel @ centred
    singular = np.linalg.svd(x, compute_uv=False) ** 2
    noise = left @ left / (30 - 1 - np.sum(singular / (singular + penalty)))
    unsure = (np.sum(x_asked**2, axis=1) - np.einsum("ij,jk,ik->i", x_asked @ x.T, kernel, x_asked @ x.T)) / penalty
    np.testing.assert_allclose(deviation, np.sqrt(noise * (1 + 1 / 30 + unsure)))


def test_the_penalty_is_the_best_when_each_is_left_out(problem: tuple[Floats, Floats]) -> None:
    features, values = problem
    values = values + np.random.default_rng(2).normal(scale=8, size=30)  # so that a large one is best
    fitted = Ridge(target="value").fit(features, values, 0)
    scaled = fitted.scaling(features)

    def error(penalty: float) -> float:
        rest = [np.delete(np.arange(30), row) for row in range(30)]
        found = [
            Plain(alpha=penalty).fit(scaled[rows], values[rows]).predict(scaled[[row]])[0]
            for row, rows in enumerate(rest)
        ]
        return float(np.mean((np.array(found) - values) ** 2))

    assert fitted.regression.alpha_ == min(Ridge().penalties, key=error)


def test_more_features_than_architectures() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(6, 40))
    mean, deviation = Ridge().fit(features, features[:, 0], 0).predict(generator.normal(size=(3, 40)))
    assert np.isfinite([mean, deviation]).all()
    assert (deviation > 0).all()
