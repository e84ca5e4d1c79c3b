"""Learning curves: those of known functions come to their known ends, and what cannot be fitted stays where it is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mil_cli.assess.curves import Curve, Form, early_stopped, extrapolate, sum_of_losses
from mil_cli.errors import DataError

EPOCHS = np.arange(1, 13)


def power(limit: float, gap: float, rate: float, epochs: np.ndarray | float = EPOCHS) -> np.ndarray:
    return limit - gap * np.asarray(epochs, dtype=float) ** -rate


def log_power(limit: float, middle: float, rate: float, epochs: np.ndarray | float = EPOCHS) -> np.ndarray:
    return limit / (1 + (np.asarray(epochs, dtype=float) / math.exp(middle)) ** -rate)


def curve(values: np.ndarray | list[float], **changes: object) -> Curve:
    return Curve(train_losses=[1.0] * len(values), val_qualities=list(values), **changes)


@pytest.mark.parametrize(("limit", "gap", "rate"), [(0.93, 0.5, 0.5), (0.7, 0.6, 1.5), (31.0, 9.0, 0.8)])
def test_a_power_law_is_continued_to_its_limit(limit: float, gap: float, rate: float) -> None:
    seen = curve(power(limit, gap, rate))
    assert extrapolate(seen).score == pytest.approx(limit, rel=1e-4)
    assert extrapolate(seen, epochs=100).score == pytest.approx(float(power(limit, gap, rate, 100)), rel=1e-4)
    assert extrapolate(seen).fitted


@pytest.mark.parametrize(("limit", "middle", "rate"), [(0.93, 0.5, 1.0), (0.8, 1.5, 2.0), (40.0, 0.0, 0.7)])
def test_a_log_power_law_is_continued_to_its_limit(limit: float, middle: float, rate: float) -> None:
    seen = curve(log_power(limit, middle, rate))
    assert extrapolate(seen, form="log_power").score == pytest.approx(limit, rel=1e-3)
    found = extrapolate(seen, epochs=50, form="log_power").score
    assert found == pytest.approx(float(log_power(limit, middle, rate, 50)), rel=1e-3)


def test_errors_that_fall_are_continued_as_qualities_that_rise() -> None:
    errors = curve(-power(-0.2, 0.6, 0.7), higher_is_better=False)  # falls to 0.2
    assert extrapolate(errors).score == pytest.approx(-0.2, rel=1e-4)
    assert early_stopped(errors) == -errors.val_qualities[-1]


def test_noise_leaves_the_continuation_nearer_to_the_end_than_the_last_epoch() -> None:
    generator = np.random.default_rng(0)
    wins = 0
    for _ in range(20):
        limit, gap, rate = generator.uniform(0.6, 0.95), generator.uniform(0.3, 0.5), generator.uniform(0.5, 1.2)
        seen = curve(power(limit, gap, rate) + generator.normal(0, 0.002, len(EPOCHS)))
        end = float(power(limit, gap, rate, 60))
        wins += abs(extrapolate(seen, epochs=60).score - end) < abs(early_stopped(seen) - end)
    assert wins >= 17


def test_curves_that_cross_are_put_into_the_order_of_their_ends() -> None:
    fast, slow = power(0.8, 0.4, 1.5, EPOCHS[:8]), power(0.95, 0.7, 0.6, EPOCHS[:8])
    assert early_stopped(curve(fast)) > early_stopped(curve(slow))
    assert extrapolate(curve(fast), epochs=200).score < extrapolate(curve(slow), epochs=200).score


@pytest.mark.parametrize("form", ["power", "log_power"])
@pytest.mark.parametrize(
    "values", [[0.5, 0.6, 0.65], [0.7] * 6, [0.1, 0.4, math.nan, 0.5, 0.6], [0.1, 0.4, math.inf, 0.5, 0.6]]
)
def test_what_cannot_be_fitted_keeps_its_last_quality(values: list[float], form: Form) -> None:
    found = extrapolate(curve(values), form=form)
    assert (found.score, found.fitted) == (values[-1], False)


def test_a_quality_that_is_not_above_0_does_not_rise_from_0() -> None:
    assert not extrapolate(curve([-0.1, 0.2, 0.3, 0.35, 0.4]), form="log_power").fitted


def test_the_sum_of_losses_is_that_of_the_last_epochs_and_larger_for_who_learns_faster() -> None:
    losses = [2.0, 1.5, 1.0, 0.75]
    assert sum_of_losses(Curve(losses, [0.5]), last=2) == -1.75
    assert sum_of_losses(Curve(losses, [0.5])) == -0.75
    faster = Curve([1.9, 1.2, 0.8, 0.6], [0.5])
    assert all(sum_of_losses(faster, last) > sum_of_losses(Curve(losses, [0.5]), last) for last in range(1, 5))
    assert math.isnan(sum_of_losses(Curve([2.0, math.nan], [0.5]), last=2))


def test_what_no_curve_is_is_refused() -> None:
    with pytest.raises(DataError, match=r"val_qualities: .*at least one epoch"):
        Curve([1.0], [])
    with pytest.raises(DataError, match="2 epochs to sum over"):
        sum_of_losses(Curve([1.0, 0.5], [0.1, 0.2]), last=3)
    with pytest.raises(DataError, match="5 epochs already"):
        extrapolate(curve([0.1, 0.2, 0.3, 0.4, 0.5]), epochs=4)
    with pytest.raises(DataError, match="lower is better"):
        extrapolate(curve([0.5, 0.4, 0.3, 0.2], higher_is_better=False), form="log_power")
