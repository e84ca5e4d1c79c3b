"""Bags: their mean, spread and out-of-bag error against a count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mil_cli.assess.predictors.bagging import bag, resampled


def test_an_architecture_is_judged_by_the_fits_that_had_not_drawn_it() -> None:
    values = np.random.default_rng(0).normal(size=12)
    rows = np.arange(12.0).reshape(-1, 1)
    drawn: list[set[float]] = []
    levels: list[float] = []

    def fit_mean(features: np.ndarray, seen: np.ndarray, seed: int) -> object:
        drawn.append(set(features[:, 0]))
        level = float(seen.mean())
        levels.append(level)
        return lambda asked: np.full(len(asked), level)

    found = bag(fit_mean, rows, values, members=6, seed=0)
    errors = []
    for row, value in enumerate(values):
        unseen = [level for level, seen in zip(levels, drawn, strict=True) if row not in seen]
        if unseen:
            errors.append((np.mean(unseen) - value) ** 2)
    assert 0 < len(errors) <= 12
    assert found.noise == pytest.approx(np.mean(errors))
    mean, deviation = found.predict(rows[:2])
    assert mean == pytest.approx(np.mean(levels))
    assert deviation == pytest.approx(np.sqrt(np.var(levels) + found.noise))


def test_no_resample_is_of_one_alone() -> None:
    generator = np.random.default_rng(0)
    assert all(len(np.unique(resampled(2, generator))) == 2 for _ in range(20))
    assert resampled(1, generator).tolist() == [0]
