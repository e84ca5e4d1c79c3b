"""Ranks the architectures of a table: by what training reached, and by a predictor where there was no training."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

from mil_cli.assess.active import next_trainings
from mil_cli.assess.costs import Clocks, costs_of
from mil_cli.assess.prediction import (
    Calibrated,
    CurvePoint,
    OutOfFold,
    calibrated,
    learning_curve,
    out_of_fold,
)
from mil_cli.assess.predictors.bagging import resampled
from mil_cli.assess.ranking import Floats, Interval, interval, tau_b
from mil_cli.assess.selection import Entry, RankConfig, Ranking
from mil_cli.assess.table import Table
from mil_cli.events import Progress, SilentProgress

_NOISES = 20  # draws of the noise for each refit, which are cheap


def rank_table(
    table: Table, config: RankConfig, *, progress: Progress | None = None, clocks: Clocks | None = None
) -> Ranking:
    """Rank a table's architectures.

    Those that were trained have their quality, others what a predictor says that learned from the trained ones. It is
    judged on trained architectures that it was not fitted to, and so are its intervals.

    Args:
        table: The architectures.
        config: The settings.
        progress: Where it is told.
        clocks: What time is taken by.

    Raises:
        DataError: Too few architectures are trained.
    """
    progress, clocks = progress or SilentProgress(), clocks or Clocks()
    began = clocks.cpu(), clocks.wall()
    known, goodness = table.known, table.goodness
    features, values = table.inputs[known], goodness[known]
    held_out = out_of_fold(
        config.predictor,
        features,
        values,
        folds=config.folds,
        repeats=config.repeats,
        seed=config.seed,
        progress=progress,
    )
    predictor = calibrated(config.predictor, features, values, held_out, level=config.level, seed=config.seed)
    curve = _curve(features, values, config, progress)
    chosen = next_trainings(
        config.predictor,
        table.inputs,
        goodness,
        config.next,
        seed=config.seed,
        excluded=table.trained,
        progress=progress,
    )
    entries = _entries(table, predictor, chosen, config, progress)
    tau, single = _agreements(table, held_out, config)
    return Ranking(
        entries=entries,
        tau=tau,
        coverage=held_out.coverage(config.level),
        single=single,
        curve=curve,
        costs=costs_of(table, fit_cpu=clocks.cpu() - began[0], fit_wall=clocks.wall() - began[1]),
        settings=config,
        higher_is_better=table.columns.higher_is_better,
    )


def _curve(features: Floats, values: Floats, config: RankConfig, progress: Progress) -> tuple[CurvePoint, ...]:
    if not config.curve:
        return ()
    return tuple(
        learning_curve(
            config.predictor,
            features,
            values,
            sizes=config.curve,
            repeats=config.curve_repeats,
            seed=config.seed,
            progress=progress,
        )
    )


def _agreements(table: Table, held_out: OutOfFold, config: RankConfig) -> tuple[Interval, dict[str, Interval]]:
    columns, known = table.columns, table.known
    first = len(columns.features)
    single = {
        name: interval(
            tau_b, table.inputs[known, first + place], table.goodness[known], seed=config.seed, draws=config.draws
        )
        for place, name in enumerate((*columns.scores, *columns.partial))
    }
    return held_out.tau(seed=config.seed, draws=config.draws), single


def _entries(
    table: Table, predictor: Calibrated, chosen: list[int], config: RankConfig, progress: Progress
) -> tuple[Entry, ...]:
    mean, deviation = predictor.predict(table.inputs)
    known, reach = table.known, float(ndtri((1 + config.level) / 2))
    value = np.where(known, table.goodness, np.where(table.trained, -np.inf, mean))
    spread = np.where(known, config.noise, np.where(table.trained, 0.0, deviation))
    ranks = _ranks(value)
    low, high = _rank_intervals(table, value, spread, config, progress)
    sign = 1 if table.columns.higher_is_better else -1
    places = {row: place for place, row in enumerate(chosen, 1)}
    entries = []
    for row in np.argsort(-value, kind="stable"):
        collapsed = bool(table.trained[row] and not known[row])
        ends = sorted(sign * (value[row] + side * reach * spread[row]) for side in (-1, 1))
        odd = ~np.isfinite(table.inputs[row])
        entries.append(
            Entry(
                id=table.ids[row],
                rank=int(ranks[row]),
                rank_low=int(low[row]),
                rank_high=int(high[row]),
                quality=None if collapsed else float(sign * value[row]),
                low=None if collapsed else float(ends[0]),
                high=None if collapsed else float(ends[1]),
                source="collapsed" if collapsed else "trained" if known[row] else "predicted",
                next=places.get(int(row)),
                rows=int(table.rows[row]),
                imputed=tuple(name for name, missing in zip(table.columns.numeric, odd, strict=True) if missing),
            )
        )
    return tuple(entries)


def _rank_intervals(
    table: Table, value: Floats, spread: Floats, config: RankConfig, progress: Progress
) -> tuple[Floats, Floats]:
    """Return the lower and upper end of each architecture's rank, each of shape (architectures,).

    The predictor is refitted to resampled trainings, so that what it has wrong for many alike moves these together;
    what its deviations leave beyond that is each architecture's own.
    """
    known, asked = table.known, ~table.trained
    draws = np.random.default_rng(config.seed)
    refitted = np.zeros((config.refits, len(table)))
    if asked.any():
        with progress.work("intervals of ranks", config.refits) as bar:
            for number in range(config.refits):
                rows = np.flatnonzero(known)[resampled(int(known.sum()), draws)]
                fitted = config.predictor.fit(table.inputs[rows], table.goodness[rows], config.seed + number)
                refitted[number, asked] = fitted.predict(table.inputs[asked]).mean
                bar.advance()
    shared = refitted - refitted.mean(axis=0)
    of_refits = shared.std(axis=0)
    shared *= np.minimum(1.0, spread / np.maximum(of_refits, np.finfo(np.float64).tiny))
    own = np.sqrt(np.maximum(0.0, spread**2 - of_refits**2))
    noise = draws.normal(size=(config.refits, _NOISES, len(table)))
    drawn = (value + shared[:, None] + own * noise).reshape(-1, len(table))
    beyond = 50 * (1 - config.level)
    low, high = np.percentile(_ranks(drawn), [beyond, 100 - beyond], axis=0, method="nearest")
    ranks = _ranks(value)
    return np.minimum(low, ranks), np.maximum(high, ranks)


def _ranks(values: Floats) -> Floats:
    """Return 1 for the largest of the last axis, and so on; equal ones have the same."""
    ranks: Floats = rankdata(-values, method="min", axis=-1)
    return ranks
