"""What to train next: closed forms, brute force, and fewer trainings than at random."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mil_cli.assess.active import (
    Acquisition,
    chance_to_be_among,
    expected_improvement,
    next_trainings,
    replay,
)
from mil_cli.assess.predictors.base import Prediction, Predictor
from mil_cli.assess.predictors.gaussian_process import GaussianProcess
from mil_cli.assess.predictors.ridge import Ridge
from mil_cli.assess.ranking import precision_at

Floats = np.ndarray
STRATEGIES = ("expected_improvement", "upper_bound", "rank_uncertainty", "thompson", "random")


def landscape(seed: int, count: int = 100) -> tuple[Floats, Floats]:
    """Return a linear landscape of eight features, and noise of a third of its deviation."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, 8))
    quality = features @ generator.normal(size=8)
    return features, quality + quality.std() / 3 * generator.normal(size=count)


def peak(seed: int, count: int = 150) -> tuple[Floats, Floats]:
    """Return a landscape with a peak somewhere, which no linear predictor finds."""
    generator = np.random.default_rng(seed)
    features = generator.uniform(-1, 1, size=(count, 3))
    return features, -np.sum((features - generator.uniform(-0.5, 0.5, size=3)) ** 2, axis=1)


def test_the_expected_improvement_is_that_of_what_is_drawn() -> None:
    prediction = Prediction(np.array([0.0, 1.0, -3.0]), np.array([1.0, 0.2, 2.0]))
    drawn = np.random.default_rng(0).normal(prediction.mean, prediction.deviation, size=(400_000, 3))
    expected = np.maximum(0, drawn - 0.5).mean(axis=0)
    np.testing.assert_allclose(expected_improvement(prediction, 0.5), expected, atol=5e-3)
    sure = Prediction(np.array([2.0, 0.0]), np.zeros(2))
    np.testing.assert_allclose(expected_improvement(sure, 0.5), [1.5, 0])


def test_the_chance_to_be_the_best_of_two_is_known() -> None:
    prediction = Prediction(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    chances = chance_to_be_among(prediction, np.array([-50.0]), 1, seed=0)
    beaten = stats.norm.cdf(1 / np.sqrt(5))
    np.testing.assert_allclose(chances, [1 - beaten, beaten], atol=0.06)
    np.testing.assert_array_equal(chance_to_be_among(prediction, np.array([50.0]), 1, seed=0), [0, 0])
    np.testing.assert_array_equal(chance_to_be_among(prediction, np.array([50.0]), 9, seed=0), [1, 1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_those_are_chosen_that_are_left_each_once(strategy: str) -> None:
    features, quality = landscape(0, 20)
    values = quality.copy()
    values[8:] = np.nan
    excluded = np.zeros(20, dtype=bool)
    excluded[8:10] = True
    acquisition = Acquisition(strategy=strategy, batch=4)
    chosen = next_trainings(Ridge(), features, values, acquisition, seed=0, excluded=excluded)
    assert len({*chosen}) == 4
    assert {*chosen} <= {*range(10, 20)}
    assert chosen == next_trainings(Ridge(), features, values, acquisition, seed=0, excluded=excluded)
    all_left = next_trainings(
        Ridge(), features, values, Acquisition(strategy=strategy, batch=50), seed=0, excluded=excluded
    )
    assert sorted(all_left) == [*range(10, 20)]
    assert next_trainings(Ridge(), features, quality, acquisition, seed=0) == []


def test_a_batch_is_chosen_as_if_its_first_had_been_trained() -> None:
    """Two architectures are alike: once one is believed to be trained, the other tells nothing new."""
    features = np.array([[0.0], [0.1], [0.2], [0.3], [0.4], [3.0], [3.0], [-3.0]])
    values = np.array([0.0, 0.1, 0.0, 0.1, 0.0, np.nan, np.nan, np.nan])
    acquisition = Acquisition(strategy="upper_bound", exploration=10, batch=2)
    chosen = next_trainings(GaussianProcess(), features, values, acquisition, seed=0)
    assert len({*chosen} & {5, 6}) == 1
    assert 7 in chosen


def test_before_a_predictor_can_be_fitted_it_is_at_random() -> None:
    features, _ = landscape(0, 20)
    drawn = {
        tuple(next_trainings(Ridge(), features, np.full(20, np.nan), Acquisition(batch=3), seed=seed))
        for seed in range(4)
    }
    assert len(drawn) > 1


def trainings_to_the_best(
    predictor: Predictor, made: tuple[Floats, Floats], strategy: str, *, seed: int, most: int
) -> int:
    features, quality = made
    acquisition = Acquisition(strategy=strategy, batch=4)
    order = replay(predictor, features, quality, acquisition, start=8, trainings=most, seed=seed)
    assert len({*order}) == most
    found = np.flatnonzero(order == quality.argmax())
    return int(found[0]) + 1 if len(found) else most + 1


def at_random(architectures: int, most: int) -> float:
    """Return the mean of the same at random: the best stands at any place with the same chance."""
    return float(np.minimum(np.arange(1, architectures + 1), most + 1).mean())


def at_most(counts: list[int]) -> float:
    """Return the upper end of the 95 % interval of their mean."""
    return float(stats.t.interval(0.95, len(counts) - 1, loc=np.mean(counts), scale=stats.sem(counts))[1])


def test_at_random_the_best_is_found_after_half_of_all_trainings() -> None:
    counts = [trainings_to_the_best(Ridge(), landscape(0), "random", seed=seed, most=40) for seed in range(400)]
    assert np.mean(counts) == pytest.approx(at_random(100, 40), abs=2)


@pytest.mark.parametrize("strategy", ["expected_improvement", "upper_bound", "thompson"])
def test_the_best_is_found_after_fewer_trainings_than_at_random(strategy: str) -> None:
    counts = [trainings_to_the_best(Ridge(), landscape(seed), strategy, seed=seed, most=40) for seed in range(6)]
    assert at_most(counts) < at_random(100, 40) - 5


def test_a_peak_is_found_by_a_gaussian_process() -> None:
    predictor = GaussianProcess(restarts=0)
    counts = [trainings_to_the_best(predictor, peak(seed), "upper_bound", seed=seed, most=32) for seed in range(4)]
    assert at_most(counts) < at_random(150, 32) - 5


def test_the_best_few_are_told_apart_after_fewer_trainings_than_at_random() -> None:
    """Where architectures are trained of which it is unsure whether they belong to the best five."""
    more = []
    for seed in range(6):
        features, quality = landscape(seed)
        found = []
        for strategy in ("rank_uncertainty", "random"):
            acquisition = Acquisition(strategy=strategy, batch=4, top=5)
            order = replay(Ridge(), features, quality, acquisition, start=8, trainings=28, seed=seed)
            scores = Ridge().fit(features[order], quality[order], seed).predict(features).mean
            scores[order] = quality[order]
            found.append(precision_at(scores, quality, 5))
        more.append(found[0] - found[1])
    assert stats.ttest_1samp(more, 0.0, alternative="greater").pvalue < 0.05
