"""Predictors are judged on what they were not fitted to; their intervals hold what they say."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy import stats

from mil_cli.assess.prediction import calibrated, learning_curve, out_of_fold
from mil_cli.assess.predictors.base import Fitted, Prediction, Predictor
from mil_cli.assess.predictors.gaussian_process import GaussianProcess
from mil_cli.assess.predictors.ridge import Ridge
from mil_cli.assess.ranking import tau_b
from mil_cli.errors import DataError

Floats = np.ndarray


@dataclass
class Memory:
    """Knows by heart what it has seen; of anything else it says what the most similar one reached."""

    features: Floats = field(default_factory=lambda: np.empty((0, 0)))
    values: Floats = field(default_factory=lambda: np.empty(0))

    def fit(self, features: Floats, values: Floats, seed: int) -> Memory:
        return Memory(features, values)

    def predict(self, features: Floats) -> Prediction:
        distances = np.abs(features[:, None] - self.features).sum(axis=2)
        return Prediction(self.values[distances.argmin(axis=1)], np.ones(len(features)))


class Mean:
    """Says of all what those that it has seen reached on average."""

    def fit(self, features: Floats, values: Floats, seed: int) -> Mean:
        found = Mean()
        found.level = float(values.mean())
        return found

    def predict(self, features: Floats) -> Prediction:
        return Prediction(np.full(len(features), self.level), np.ones(len(features)))


@dataclass
class Spy:
    """Records the rows of each fit, and of what the fit was then asked; the first feature is the row's number."""

    seen: list[tuple[set[float], set[float]]] = field(default_factory=list)

    def fit(self, features: Floats, values: Floats, seed: int) -> SpyFit:
        np.testing.assert_array_equal(features[:, 0], values)
        return SpyFit(set(features[:, 0]), self)


@dataclass
class SpyFit:
    rows: set[float]
    spy: Spy

    def predict(self, features: Floats) -> Prediction:
        self.spy.seen.append((self.rows, set(features[:, 0])))
        return Prediction(features[:, 0], np.ones(len(features)))


@dataclass
class Overconfident:
    """A predictor whose deviations are ten times too small."""

    predictor: Predictor
    fitted: Fitted | None = None

    def fit(self, features: Floats, values: Floats, seed: int) -> Overconfident:
        return Overconfident(self.predictor, self.predictor.fit(features, values, seed))

    def predict(self, features: Floats) -> Prediction:
        assert self.fitted is not None
        mean, deviation = self.fitted.predict(features)
        return Prediction(mean, deviation / 10)


def drawn(seed: int, count: int, noise: float = 1.0) -> tuple[Floats, Floats]:
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, 4))
    return features, features @ [2.0, 1.0, 0.5, 0.0] + noise * generator.normal(size=count)


def test_nothing_is_predicted_that_was_fitted_to() -> None:
    spy = Spy()
    numbers = np.arange(23.0)
    found = out_of_fold(spy, numbers.reshape(-1, 1), numbers, folds=5, repeats=3, seed=0)
    assert len(spy.seen) == 15
    for fitted, asked in spy.seen:
        assert not fitted & asked
        assert fitted | asked == set(numbers)
    for repeat in range(3):
        asked = [number for _, rows in spy.seen[5 * repeat : 5 * repeat + 5] for number in rows]
        assert sorted(asked) == numbers.tolist()
    np.testing.assert_array_equal(found.mean, np.tile(numbers, (3, 1)))
    assert {*spy.seen[0][1]} != {*spy.seen[5][1]}  # shuffled anew


def test_the_learning_curve_asks_for_none_that_was_fitted_to_and_always_for_the_same() -> None:
    spy = Spy()
    numbers = np.arange(30.0)
    learning_curve(spy, numbers.reshape(-1, 1), numbers, sizes=(20, 5, 29), repeats=2, seed=0)
    assert [len(fitted) for fitted, _ in spy.seen] == [5, 20, 5, 20]
    assert all(not fitted & asked for fitted, asked in spy.seen)
    assert spy.seen[0][1] == spy.seen[1][1] != spy.seen[2][1]
    assert spy.seen[0][0] < spy.seen[1][0]


def test_knowing_random_qualities_by_heart_is_worth_nothing() -> None:
    taus = []
    for seed in range(10):
        generator = np.random.default_rng(seed)
        features, values = generator.normal(size=(60, 3)), generator.normal(size=60)
        assert tau_b(Memory().fit(features, values, 0).predict(features).mean, values) == 1
        taus.append(out_of_fold(Memory(), features, values, folds=5, repeats=3, seed=seed).tau(seed=0, draws=2).value)
    assert abs(np.mean(taus)) < 0.1


def test_folds_are_not_compared() -> None:
    """What was held out lowers the mean of the rest, so that a mean ranks folds the wrong way round."""
    features, values = drawn(0, 20)
    found = out_of_fold(Mean(), features, values, folds=10, repeats=1, seed=0)
    assert tau_b(found.mean[0], values) < -0.3
    assert np.isnan(found.tau(seed=0, draws=2).value)


def test_tau_is_about_that_on_fresh_architectures() -> None:
    features, values = drawn(0, 80)
    asked, truth = drawn(1, 2000)
    found = out_of_fold(Ridge(), features, values, folds=5, repeats=3, seed=0).tau(seed=0, draws=200)
    fresh = tau_b(Ridge().fit(features, values, 0).predict(asked).mean, truth)
    assert found.low < fresh < found.high
    assert found.value == pytest.approx(fresh, abs=0.1)


@pytest.mark.parametrize("predictor", [Ridge(), Overconfident(Ridge()), GaussianProcess(restarts=0)])
def test_ninety_in_a_hundred_are_in_their_intervals(predictor: Predictor) -> None:
    held, said = [], []
    for seed in range(8):
        features, values = drawn(seed, 50)
        asked, truth = drawn(100 + seed, 300)
        scores = out_of_fold(predictor, features, values, folds=5, repeats=1, seed=seed)
        mean, deviation = calibrated(predictor, features, values, scores, level=0.9, seed=seed).predict(asked)
        held.append(np.mean(np.abs(truth - mean) <= stats.norm.ppf(0.95) * deviation))
        said.append(scores.coverage(0.9))
    assert 0.8 < np.mean(held) < 0.97
    assert 0.8 < np.mean(said) < 0.97


def test_a_calibrated_deviation_is_that_of_the_residuals() -> None:
    features, values = drawn(0, 200)
    asked, truth = drawn(1, 2000)
    predictor = Overconfident(Ridge())
    scores = out_of_fold(predictor, features, values, folds=5, repeats=2, seed=0)
    found = calibrated(predictor, features, values, scores, level=0.9, seed=0)
    mean, deviation = found.predict(asked)
    assert np.std((truth - mean) / deviation) == pytest.approx(1, abs=0.15)


def test_intervals_are_those_of_the_conformal_rank() -> None:
    """Residuals 1 to 19: the rank ceil(20 * 0.9) = 18 of them is the bound."""
    values = np.arange(1.0, 20.0) * np.tile([1, -1], 10)[:19]
    zero = out_of_fold(Zero(), np.zeros((19, 1)), values, folds=2, repeats=1, seed=0)
    assert zero.width(0.9) == 18
    assert zero.width(0.99) == 19  # fewer than such an interval needs


class Zero:
    def fit(self, features: Floats, values: Floats, seed: int) -> Zero:
        return self

    def predict(self, features: Floats) -> Prediction:
        return Prediction(np.zeros(len(features)), np.ones(len(features)))


def test_more_trainings_rank_better() -> None:
    features, values = drawn(0, 120)
    curve = learning_curve(Ridge(), features, values, sizes=(4, 12, 80), repeats=10, seed=0)
    assert [point.trained for point in curve] == [4, 12, 80]
    assert curve[0].tau.value < curve[1].tau.value < curve[2].tau.value
    assert all(point.tau.low <= point.tau.value <= point.tau.high for point in curve)
    assert curve[0].regret.value > curve[2].regret.value >= curve[2].regret.low >= 0


def test_the_regret_is_that_of_what_is_ranked_first() -> None:
    """Of 0 to 19 six are held out each time; one that says the same of all chooses their mean."""
    numbers = np.arange(20.0)
    (point,) = learning_curve(Mean(), numbers.reshape(-1, 1), numbers, sizes=(10,), repeats=400, seed=0)
    expected = 6 * 21 / 7 - 1 - 9.5  # the mean of the largest of six, less the mean of all
    assert point.regret.value == pytest.approx(expected, abs=0.3)


def test_too_few_are_said() -> None:
    features, values = drawn(0, 3)
    with pytest.raises(DataError, match=r"too few architectures(.|\n)*got 3(.|\n)*train some more"):
        out_of_fold(Ridge(), features, values, folds=5, repeats=1, seed=0)
    with pytest.raises(DataError, match=r"learning curve(.|\n)*2 to 7"):
        learning_curve(Ridge(), *drawn(0, 10), sizes=(50,), repeats=2, seed=0)
    folds = out_of_fold(Ridge(), *drawn(0, 7), folds=5, repeats=1, seed=0).folds
    assert np.bincount(folds[0]).min() >= 2
