"""From single timings to percentiles, a paired ratio with its interval, and a verdict."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

NO_DIFFERENCE = "no real difference"
"""The verdict on two models that the measurement cannot tell apart."""

SAME_WITHIN = 0.03
"""Ratios this close to 1 are no real difference: two sessions of one file differ by 1 to 2 % persistently."""

RESAMPLES = 2000
_CHUNK = 4_000_000
"""Values that are resampled at a time, to bound memory."""


def percentiles(milliseconds: Array) -> tuple[float, float, float]:
    """Return the median, the 90th and the 99th percentile of all timings."""
    p50, p90, p99 = np.percentile(milliseconds, [50, 90, 99])
    return float(p50), float(p90), float(p99)


def paired_ratio(times: Array, baseline: Array) -> float:
    """Return how long a model takes relative to the baseline: timings of neighbouring rounds are paired.

    The median over the pairs of each session, then the geometric mean over the sessions.

    Args:
        times: One time for each session and round, shape (sessions, rounds).
        baseline: The baseline's, same shape.
    """
    return float(np.exp(np.median(_log_ratios(times, baseline), axis=1).mean()))


def _log_ratios(times: Array, baseline: Array) -> Array:
    """Return the logarithm of the ratio in each two rounds, shape (sessions, rounds // 2).

    The order of the models is reversed from round to round, so a round and the next together favour neither.
    """
    logs = np.log(times / baseline)
    even = logs.shape[1] // 2 * 2
    paired: Array = logs[:, :even].reshape(logs.shape[0], -1, 2).mean(axis=2)
    return paired


def ratio_interval(
    times: Array, baseline: Array, *, generator: np.random.Generator, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of `paired_ratio`.

    Sessions are resampled, then the rounds of each (Davison and Hinkley, Bootstrap Methods and their Application, 3.8):
    what one session has for good, such as where its memory lies, counts as one draw however many rounds it ran. The
    spread among few sessions is biased low by (sessions - 1) / sessions, which is put right by widening about the
    centre.

    Args:
        times: One time for each session and round, shape (sessions, rounds).
        baseline: The baseline's, same shape.
        generator: Draws the resamples.
        resamples: How many are drawn.
    """
    logs = _log_ratios(times, baseline)
    sessions, rounds = logs.shape
    chunk = max(1, _CHUNK // logs.size)
    draws = []
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        chosen = generator.integers(sessions, size=(count, sessions, 1))
        within = generator.integers(rounds, size=(count, sessions, rounds))
        draws.append(np.median(logs[chosen, within], axis=2).mean(axis=1))
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    centre = float(np.median(logs, axis=1).mean())
    widen = float(np.sqrt(sessions / (sessions - 1))) if sessions > 1 else 1.0
    low, high = (centre + widen * (bound - centre) for bound in (min(low, centre), max(high, centre)))
    return float(np.exp(low)), float(np.exp(high))


def verdict(ratio: float, interval: tuple[float, float]) -> str:
    """Say what a ratio means: ``faster``, ``slower`` or ``no real difference``."""
    low, high = interval
    if low <= 1.0 <= high or abs(ratio - 1.0) <= SAME_WITHIN:
        return NO_DIFFERENCE
    return "faster" if ratio < 1.0 else "slower"
