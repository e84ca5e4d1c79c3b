"""Ranks the architectures of a table: by what training reached, and by a predictor where there was no training."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

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
from mil_cli.assess.rank_intervals import rank_intervals, ranks
from mil_cli.assess.ranking import Floats, Interval, interval, tau_b
from mil_cli.assess.selection import Entry, RankConfig, Ranking
from mil_cli.assess.table import Table
from mil_cli.events import Progress, SilentProgress


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
    order = ranks(value)
    low, high = rank_intervals(table, config, progress)
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
                rank=int(order[row]),
                rank_low=int(min(low[row], order[row])),
                rank_high=int(max(high[row], order[row])),
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
