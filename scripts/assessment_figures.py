"""What each way to judge architectures is worth on a data set, and what it costs: figures for the page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from mil_cli.assess.predictors.base import Predictor
from mil_cli.assess.ranking import (
    Floats,
    Interval,
    interval,
    noise_ceiling,
    precision_at,
    ranked,
    regret,
    tau_b,
    top_tau,
)
from scripts.architecture_data import Architectures
from scripts.architecture_points import SCORES, SIZES

DRAWS = 20
"""Draws of the few architectures that a predictor learns from."""
_TOP = 10


@dataclass(frozen=True)
class Way:
    """A way to judge architectures that needs no whole training.

    Attributes:
        name: What tables call it.
        kind: Of which kind it is.
        scores: Of each architecture, larger being better, shape (architectures,).
        seconds: Processor time of all of it.
    """

    name: str
    kind: str
    scores: Floats
    seconds: float


@dataclass(frozen=True)
class Figures:
    """What a way is worth.

    Attributes:
        name: What tables call it.
        kind: Of which kind it is.
        seconds: Processor time of all of it.
        speed: How many times longer training all would take.
        tau: Kendall's tau-b to one whole training of each.
        top: The same among the best tenth.
        precision: Which share of its ten best belongs to the ten best.
        regret: By how much the best architecture is better than the one that it thinks best.
    """

    name: str
    kind: str
    seconds: float
    speed: float
    tau: Interval
    top: float
    precision: float
    regret: float


def sizes(data: Architectures) -> Iterator[Way]:
    """Yield the baselines: larger is thought better; counting takes no time worth telling."""
    for name in SIZES:
        yield Way(name, "size", data.column(name), 0.0)


def scores(data: Architectures) -> Iterator[Way]:
    """Yield the scores of first weights, each with the capture that it needs."""
    captured = data.seconds("capture")
    for name in SCORES:
        yield Way(name, "score", data.column(name), float((captured + data.seconds(name)).sum()))


def curves(data: Architectures) -> Iterator[Way]:
    """Yield what the first epochs of the whole trainings say."""
    captured = data.seconds("capture")
    for epochs in range(1, data.epochs // 2 + 1):
        trained = captured + data.seconds("training", epochs=epochs)
        losses = np.sum([data.column(f"train_loss_{number}") for number in range(1, epochs + 1)], axis=0)
        yield Way(f"losses of {epochs} epochs", "curve", -losses, float(trained.sum()))
        judged = trained + data.column(f"validation_cpu_seconds_{epochs}")
        yield Way(f"val after {epochs} epochs", "curve", data.column(f"val_{epochs}"), float(judged.sum()))


def computed(data: Architectures, method: str, kind: str, result: Mapping[str, object]) -> Iterator[Way]:
    """Yield what a point of `scripts.assessors` gave."""
    values, without = result["values"], result["without"]
    assert isinstance(values, dict)
    assert isinstance(without, dict)
    spent = float(str(result["cpu_seconds"]))
    for name, found in values.items():
        yield Way(f"{method} {name}", kind, data.values(found), spent - float(without.get(name, 0.0)))


def together(ways: Sequence[Way]) -> Way:
    """Return the mean of the ranks of several ways, whose times add up."""
    scores = np.mean([rankdata(ranked(way.scores)) for way in ways], axis=0)
    return Way(" + ".join(way.name for way in ways), "mix", scores, sum(way.seconds for way in ways))


def worth(way: Way, data: Architectures, *, seed: int = 0) -> Figures:
    """Return what a way is worth on all architectures."""
    truth = data.quality
    return Figures(
        way.name,
        way.kind,
        way.seconds,
        _speed(way.seconds, data),
        interval(tau_b, way.scores, truth, seed=seed),
        top_tau(way.scores, truth),
        precision_at(way.scores, truth, _TOP),
        regret(way.scores, truth),
    )


def learned(
    name: str, predictor: Predictor, ways: Sequence[Way], data: Architectures, *, trained: int, encoded: bool = True
) -> Figures:
    """Return what a predictor is worth that learned from a few whole trainings; a mean over draws of these.

    Tau, the best tenth and precision are those of architectures that it has not seen. The one it thinks best may be one
    of those trained.

    Args:
        name: What tables call it.
        predictor: The predictor.
        ways: What it reads beside the choices; their times count.
        data: The data set.
        trained: How many whole trainings it learns from.
        encoded: Whether it reads the choices.
    """
    inputs = np.column_stack([*([data.encodings] if encoded else []), *(way.scores for way in ways)])
    truth = data.quality
    generator = np.random.default_rng(trained)
    taus, rows, spent = [], [], []
    for draw in range(DRAWS):
        order = generator.permutation(len(truth))
        seen, rest = order[:trained], order[trained:]
        began = time.process_time()
        mean = predictor.fit(inputs[seen], truth[seen], draw).predict(inputs).mean
        fitting = time.process_time() - began
        taus.append(tau_b(mean[rest], truth[rest]))
        believed = mean.copy()
        believed[seen] = truth[seen]
        rows.append(
            (
                top_tau(mean[rest], truth[rest]),
                precision_at(mean[rest], truth[rest], _TOP),
                regret(believed, truth),
            )
        )
        spent.append(float(data.whole[seen].sum()) + fitting)
    ordered = [tau for tau in taus if not np.isnan(tau)]  # one that ranks all alike has none
    low, high = np.percentile(ordered, [2.5, 97.5]) if ordered else (np.nan, np.nan)
    top, precision, short = (_mean(column) for column in zip(*rows, strict=True))
    seconds = sum(way.seconds for way in ways) + float(np.mean(spent))
    tau = Interval(_mean(ordered), float(low), float(high))
    return Figures(name, "predictor", seconds, _speed(seconds, data), tau, top, precision, short)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _speed(seconds: float, data: Architectures) -> float:
    return float(data.whole.sum()) / seconds if seconds else np.inf


def ceiling(data: Architectures) -> tuple[float, float, float]:
    """Return the tau of trainings of other seeds with each other, and its 95 % interval over architectures."""
    values = data.by_seed
    generator = np.random.default_rng(0)
    drawn = [noise_ceiling(values[generator.integers(len(values), size=len(values))]) for _ in range(500)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return noise_ceiling(values), float(low), float(high)


@dataclass(frozen=True)
class Selection:
    """What choosing the best under a bound costs by a way, beside training random ones.

    Attributes:
        name: The way.
        trained: How many of those it thinks best are trained whole; the best of them is chosen.
        regret: By how much the best within the bound is better.
        seconds: Processor time of judging all within the bound, and of these trainings.
        random: How many trainings of random ones it takes to be as good on average.
        speed: How many times longer these take.
    """

    name: str
    trained: int
    regret: float
    seconds: float
    random: int
    speed: float


def select(way: Way, data: Architectures, *, bound: float, trained: int) -> Selection:
    """Return what a way saves in choosing the best architecture with at most so many operations."""
    within = np.flatnonzero(data.column("macs") <= bound)
    truth, whole = data.quality[within], data.whole[within]
    chosen = np.argsort(-ranked(way.scores)[within], kind="stable")[:trained]
    short = float(np.nanmax(truth) - np.nanmax(truth[chosen]))
    seconds = way.seconds * len(within) / len(data) + float(whole[chosen].sum())
    count = next(count for count in range(1, len(within) + 1) if _expected_regret(truth, count) <= short + 1e-12)
    return Selection(way.name, trained, short, seconds, count, count * float(whole.mean()) / seconds)


def _expected_regret(truth: Floats, count: int) -> float:
    """Return by how much the best of so many random ones falls short on average, without replacement.

    The k-th best is the best of them if it is drawn and no better one is.
    """
    ordered = np.sort(ranked(truth))[::-1]
    total = len(ordered)
    none_better, expected = 1.0, 0.0
    for place, value in enumerate(ordered):
        left = total - place
        drawn = min(1.0, count / left)  # given that no better one is among the drawn
        expected += none_better * drawn * (ordered[0] - value)
        none_better *= 1 - drawn
    return float(expected)
