"""Between which ranks an architecture lies: by refits of the predictor, and by what single trainings are off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

from mil_cli.assess.predictors.bagging import resampled
from mil_cli.assess.predictors.targets import NormalScores
from mil_cli.assess.ranking import Floats
from mil_cli.assess.selection import RankConfig
from mil_cli.assess.table import Table
from mil_cli.events import Progress

_NOISES = 20  # draws of the noise for each refit, which are cheap


def rank_intervals(table: Table, config: RankConfig, progress: Progress) -> tuple[Floats, Floats]:
    """Return the lower and upper end of each architecture's rank, each of shape (architectures,).

    The predictor is refitted to resampled trainings, so that what it has wrong for many alike moves these together;
    what its deviations leave beyond that is each architecture's own. All is done on the normal scores of what was
    trained, as only the order counts. How far deviations are to be trusted comes from trainings that a refit had not
    drawn.

    Args:
        table: The architectures; those whose training collapsed are last.
        config: The settings.
        progress: Where it is told.
    """
    known = table.known
    targets = NormalScores.of(table.goodness[known])
    centre = np.full(len(table), -np.inf)
    spread, shared = np.zeros(len(table)), np.zeros((config.refits, len(table)))
    centre[known] = targets.scores
    spread[known] = _in_scores(config.noise, table.goodness[known], targets)
    asked = ~table.trained
    generator = np.random.default_rng(config.seed)
    if asked.any():
        fitted = config.predictor.fit(table.inputs[known], targets.scores, config.seed)
        refits = _refits(table, targets, config, generator, progress)
        centre[asked], deviation = fitted.predict(table.inputs[asked])
        spread[asked] = deviation * np.quantile(refits.residuals, config.level) / ndtri((1 + config.level) / 2)
        shared[:, asked] = refits.means - refits.means.mean(axis=0)
    of_refits = shared.std(axis=0)
    shared *= np.minimum(1.0, spread / np.maximum(of_refits, np.finfo(np.float64).tiny))
    own = np.sqrt(np.maximum(0.0, spread**2 - of_refits**2))
    noise = generator.normal(size=(config.refits, _NOISES, len(table)))
    drawn = (centre + shared[:, None] + own * noise).reshape(-1, len(table))
    beyond = 50 * (1 - config.level)
    low, high = np.percentile(ranks(drawn), [beyond, 100 - beyond], axis=0, method="nearest")
    return low, high


def ranks(values: Floats) -> Floats:
    """Return 1 for the largest of the last axis, and so on; equal ones have the same."""
    found: Floats = rankdata(-values, method="min", axis=-1)
    return found


@dataclass(frozen=True, eq=False)
class _Refits:
    """Fits to resampled trainings.

    Attributes:
        means: What each thinks of those that are not trained, shape (refits, architectures).
        residuals: How many deviations those trainings are off that a refit had not drawn, of all refits.
    """

    means: Floats
    residuals: Floats


def _refits(
    table: Table, targets: NormalScores, config: RankConfig, generator: np.random.Generator, progress: Progress
) -> _Refits:
    features, asked = table.inputs[table.known], table.inputs[~table.trained]
    means, residuals = [], []
    with progress.work("intervals of ranks", config.refits) as bar:
        for number in range(config.refits):
            rows = resampled(len(features), generator)
            fitted = config.predictor.fit(features[rows], targets.scores[rows], config.seed + number)
            means.append(fitted.predict(asked).mean)
            unseen = np.setdiff1d(np.arange(len(features)), rows)
            if len(unseen):
                mean, deviation = fitted.predict(features[unseen])
                residuals.append(np.abs(targets.scores[unseen] - mean) / np.maximum(deviation, np.finfo(float).tiny))
            bar.advance()
    return _Refits(np.stack(means), np.concatenate(residuals) if residuals else np.ones(1))


def _in_scores(noise: float, values: Floats, targets: NormalScores) -> Floats:
    """Return what a deviation of the values is in scores, shape (architectures,)."""
    low, high = (np.interp(values + side * noise, targets.values, targets.places) for side in (-1, 1))
    return (high - low) / 2
