from __future__ import annotations

import numpy as np
import pytest

from mil_cli.measure.latency import PASSED, PROCESSOR, turn_times
from mil_cli.measure.statistics import NO_DIFFERENCE, paired_ratio, percentiles, ratio_interval, verdict


def noisy(generator: np.random.Generator, *, ratio: float, sessions: int = 3, rounds: int = 60, spread: float = 0.01):
    """Return timings of a model and its baseline: common drift, own noise, and a lasting shift of each session."""
    drift = np.exp(0.3 * np.sin(np.linspace(0, 7, sessions * rounds)).reshape(sessions, rounds))
    shift = generator.normal(0, spread, (2, sessions, 1))
    noise = generator.normal(0, 0.05, (2, sessions, rounds))
    times = drift * np.exp(shift + noise)
    return ratio * times[0], times[1]


def test_percentiles_are_those_of_all_timings() -> None:
    assert percentiles(np.arange(101.0)) == pytest.approx((50.0, 90.0, 99.0))


def test_common_drift_leaves_the_ratio_alone() -> None:
    baseline = np.exp(np.random.default_rng(0).normal(0, 1, (3, 60)))
    assert paired_ratio(0.25 * baseline, baseline) == pytest.approx(0.25)
    low, high = ratio_interval(0.25 * baseline, baseline, generator=np.random.default_rng(0))
    assert (low, high) == pytest.approx((0.25, 0.25))


def test_the_order_in_a_round_favours_neither() -> None:
    # Whoever comes second in a round takes three times as long; the order is reversed from round to round.
    second = np.arange(60) % 2 == 0
    baseline = np.where(second, 1.0, 3.0)[None].repeat(3, axis=0)
    model = np.where(second, 3.0, 1.0)[None].repeat(3, axis=0) * 0.5
    assert paired_ratio(model, baseline) == pytest.approx(0.5)
    assert ratio_interval(model, baseline, generator=np.random.default_rng(0)) == pytest.approx((0.5, 0.5))


def test_outliers_do_not_move_the_ratio() -> None:
    baseline = np.ones((3, 60))
    model = np.full((3, 60), 0.5)
    model[:, ::10] = 40.0
    assert paired_ratio(model, baseline) == pytest.approx(0.5)


def test_a_busy_machine_does_not_move_the_ratio_of_turns() -> None:
    """Other programs hit six in ten inferences of the model and one in ten of its baseline, and only ever slow down."""
    generator = np.random.default_rng(0)
    true = np.array([0.5, 1.0])[None, :, None, None]
    inferences = true * generator.normal(1.0, 0.005, (3, 2, 60, 5))
    share = np.array([0.6, 0.1])[None, :, None, None]
    hit = generator.random(inferences.shape) < share
    inferences = np.where(hit, inferences * generator.uniform(1.2, 3.0, inferences.shape), inferences)
    clocks = np.stack([inferences, np.full_like(inferences, 9.0)], axis=-1)
    turns = turn_times(clocks.tolist(), PASSED)
    assert turns.shape == (3, 2, 60)
    assert paired_ratio(turns[:, 0], turns[:, 1]) == pytest.approx(0.5, rel=0.01)
    low, high = ratio_interval(turns[:, 0], turns[:, 1], generator=generator)
    assert 0.49 < low < high < 0.51
    medians = np.median(inferences, axis=3)
    assert paired_ratio(medians[:, 0], medians[:, 1]) > 0.55


def test_turns_may_differ_in_length_between_sessions() -> None:
    seconds = [[[[[2.0, 5.0], [1.0, 6.0]]]], [[[[4.0, 3.0]]]]]
    assert turn_times(seconds, PASSED).tolist() == [[[1.0]], [[4.0]]]
    assert turn_times(seconds, PROCESSOR).tolist() == [[[5.0]], [[3.0]]]


def test_the_interval_covers_the_true_ratio() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        times, baseline = noisy(generator, ratio=0.5, sessions=4)
        low, high = ratio_interval(times, baseline, generator=generator, resamples=400)
        assert low <= paired_ratio(times, baseline) <= high
        covered += low <= 0.5 <= high
    # Four sessions cannot carry 95 % by a bootstrap; less than 85 % would be a mistake in it.
    assert covered >= 170


def test_sessions_that_differ_for_good_widen_the_interval() -> None:
    same = noisy(np.random.default_rng(1), ratio=1.0, spread=0.0)
    apart = noisy(np.random.default_rng(1), ratio=1.0, spread=0.05)
    widths = [np.subtract(*ratio_interval(*pair, generator=np.random.default_rng(2))[::-1]) for pair in (same, apart)]
    assert widths[1] > 2 * widths[0]


def test_the_interval_follows_from_the_seed() -> None:
    times, baseline = noisy(np.random.default_rng(0), ratio=0.7)
    intervals = [ratio_interval(times, baseline, generator=np.random.default_rng(5)) for _ in range(2)]
    assert intervals[0] == intervals[1]


@pytest.mark.parametrize(
    ("ratio", "interval", "expected"),
    [
        (0.5, (0.4, 0.6), "faster"),
        (0.5, (0.4, 1.0), NO_DIFFERENCE),
        (1.2, (1.1, 1.3), "slower"),
        (1.2, (0.9, 1.5), NO_DIFFERENCE),
        (1.029, (1.02, 1.04), NO_DIFFERENCE),
        (0.971, (0.96, 0.98), NO_DIFFERENCE),
        (1.04, (1.03, 1.05), "slower"),
        (0.96, (0.95, 0.97), "faster"),
    ],
)
def test_verdict(ratio: float, interval: tuple[float, float], expected: str) -> None:
    assert verdict(ratio, interval) == expected
