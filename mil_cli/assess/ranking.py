"""How well scores rank architectures: agreement of two orders, its interval, and the most that noise lets it be.

Scores are larger where an architecture is thought better. One that is no number (a score that overflowed, a training
that collapsed) ranks below all others, and is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]

Figure: TypeAlias = Callable[[Floats, Floats], float]
"""(scores, truth) -> a figure of the ranking, of architectures in the same order."""

DRAWS = 2000
_LEVEL = 95.0  # % of an interval


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval.

    Attributes:
        value: Of all architectures.
        low: The interval's lower end; NaN where too few draws had a value.
        high: Its upper end.
    """

    value: float
    low: float
    high: float


def ranked(scores: ArrayLike) -> Floats:
    """Return scores with minus infinity for what is no number, so that it comes last."""
    values = np.asarray(scores, dtype=np.float64)
    return np.where(np.isnan(values), -np.inf, values)


def tau_b(scores: ArrayLike, truth: ArrayLike) -> float:
    """Return Kendall's tau-b of two orders, in which equal values are ties.

    Kendall 1945, "The treatment of ties in ranking problems". NaN where one side has but one value.
    """
    # scipy's takes twenty times as long, for a p-value that no one reads; a bootstrap asks thousands of times
    return _normalised(*_tally(ranked(scores), ranked(truth)))


def pooled_tau(scores: ArrayLike, truth: ArrayLike, groups: ArrayLike) -> float:
    """Return tau-b of the pairs within groups alone, all groups together.

    Scores of several predictors, each with a level of its own, can be compared only where one predictor gave both.

    Args:
        scores: Shape (architectures,).
        truth: Shape (architectures,).
        groups: The number of each one's group, shape (architectures,).
    """
    found, wanted, numbers = ranked(scores), ranked(truth), np.asarray(groups)
    tallies = [_tally(found[numbers == number], wanted[numbers == number]) for number in np.unique(numbers)]
    return _normalised(*np.sum(tallies, axis=0))


def top_tau(scores: ArrayLike, truth: ArrayLike, share: float = 0.1) -> float:
    """Return tau-b among the truly best: a ranking of all may be good and yet not tell the good ones apart.

    Args:
        scores: Shape (architectures,).
        truth: Shape (architectures,).
        share: Of all architectures; at least two are taken.
    """
    wanted = ranked(truth)
    count = max(2, round(share * len(wanted)))
    best = np.argsort(-wanted, kind="stable")[:count]
    return tau_b(ranked(scores)[best], wanted[best])


def precision_at(scores: ArrayLike, truth: ArrayLike, count: int = 10) -> float:
    """Return which share of the architectures with the highest scores belongs to the truly best, as many of each.

    Where scores are equal the expected share counts, so that the order in which architectures are listed has no part.
    """
    count = min(count, len(np.asarray(truth)))
    return float(_chances(ranked(scores), count) @ _chances(ranked(truth), count)) / count


def regret(scores: ArrayLike, truth: ArrayLike) -> float:
    """Return how much better the best architecture is than the one of the highest score (their mean, where some tie).

    Architectures whose true value is no number are not chosen from.
    """
    found, wanted = ranked(scores), np.asarray(truth, dtype=np.float64)
    known = ~np.isnan(wanted)
    found, wanted = found[known], wanted[known]
    return float(wanted.max() - wanted[found == found.max()].mean())


def interval(figure: Figure, scores: ArrayLike, truth: ArrayLike, *, seed: int, draws: int = DRAWS) -> Interval:
    """Return a figure with the percentile interval of a bootstrap over architectures."""
    found, wanted = ranked(scores), ranked(truth)
    return bootstrap(lambda chosen: figure(found[chosen], wanted[chosen]), len(found), seed=seed, draws=draws)


def difference(
    figure: Figure, scores: ArrayLike, others: ArrayLike, truth: ArrayLike, *, seed: int, draws: int = DRAWS
) -> Interval:
    """Return how much more of a figure some scores have than others; a draw takes the same architectures for both."""
    found, other, wanted = ranked(scores), ranked(others), ranked(truth)
    return bootstrap(
        lambda chosen: figure(found[chosen], wanted[chosen]) - figure(other[chosen], wanted[chosen]),
        len(found),
        seed=seed,
        draws=draws,
    )


def bootstrap(value_of: Callable[[NDArray[np.int64]], float], count: int, *, seed: int, draws: int = DRAWS) -> Interval:
    """Return a figure with the percentile interval of a bootstrap.

    Args:
        value_of: The rows that were drawn -> the figure of these; NaN if they have none.
        count: How many rows there are.
        seed: Of the draws.
        draws: How many there are.
    """
    generator = np.random.default_rng(seed)
    drawn = np.array([value_of(generator.integers(count, size=count)) for _ in range(draws)])
    drawn = drawn[~np.isnan(drawn)]  # a draw that took one architecture alone has no order
    beyond = (100 - _LEVEL) / 2
    low, high = np.percentile(drawn, [beyond, 100 - beyond]) if len(drawn) else (np.nan, np.nan)
    return Interval(value_of(np.arange(count)), float(low), float(high))


def noise_ceiling(by_seed: ArrayLike) -> float:
    """Return the tau-b that one training has on average with the training from another seed.

    A score cannot be expected to rank better against one training of each architecture than training them again does.

    Args:
        by_seed: True values of shape (architectures, seeds), of two seeds or more.

    Raises:
        ValueError: There is but one seed.
    """
    values = np.asarray(by_seed, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"a noise ceiling needs two seeds or more of each architecture, not shape {values.shape}")
    firsts, seconds = np.triu_indices(values.shape[1], 1)
    return float(np.mean([tau_b(values[:, a], values[:, b]) for a, b in zip(firsts, seconds, strict=True)]))


def _signs(values: Floats) -> Floats:
    """Return for each pair whether the first is larger (1), smaller (-1) or neither (0); infinities may be equal."""
    return np.subtract(values[:, None] > values, values[:, None] < values, dtype=np.float64)


def _tally(scores: Floats, truth: Floats) -> tuple[float, float, float]:
    """Return agreeing less disagreeing pairs, and the pairs that are no tie in either order (each counted twice)."""
    order, other = _signs(scores), _signs(truth)
    return float((order * other).sum()), float(np.abs(order).sum()), float(np.abs(other).sum())


def _normalised(agreement: float, pairs: float, other_pairs: float) -> float:
    return float(agreement / math.sqrt(pairs * other_pairs)) if pairs and other_pairs else math.nan


def _chances(values: Floats, count: int) -> Floats:
    """Return each value's chance to be among the highest, where ties at the border are broken at random."""
    border = np.sort(values)[-count]
    above = values > border
    at_border = values == border
    chance = (count - int(above.sum())) / int(at_border.sum())
    return np.where(above, 1.0, np.where(at_border, chance, 0.0))
