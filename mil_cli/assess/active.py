"""Which architectures to train next, so that the best is found after few trainings."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import ndtr

from mil_cli.assess.prediction import FEWEST
from mil_cli.assess.predictors.base import Fitted, Prediction, Predictor
from mil_cli.assess.predictors.targets import NormalScores
from mil_cli.assess.ranking import Floats
from mil_cli.assess.table import Bools, Ints
from mil_cli.events import Progress, SilentProgress

_DRAWS = 500
_CERTAIN = 40.0  # deviations from which on no double tells a density from zero


class Acquisition(BaseModel):
    """How the next trainings are chosen.

    Attributes:
        strategy: ``expected_improvement`` over the best so far (Jones et al. 1998, "Efficient global optimization of
            expensive black-box functions"); ``upper_bound``: mean plus deviations (Srinivas et al. 2010, "Gaussian
            process optimization in the bandit setting"); ``rank_uncertainty``: those of which it is least sure whether
            they belong to the best `top`, so that these are told apart; ``thompson``: the best of what the predictor
            may believe, drawn anew for each, and apart for each architecture (Thompson 1933, "On the likelihood that
            one unknown probability exceeds another"; White et al. 2021, "BANANAS"); ``random``: the baseline.
        batch: How many are trained at a time. Each is chosen as if those before it had reached what is expected of
            them (Ginsbourger et al. 2010, "Kriging is well-suited to parallelize optimization"), for which a predictor
            is fitted each time; by ``thompson``, whose draws differ anyway, it is fitted once.
        exploration: Deviations that ``upper_bound`` adds.
        top: How many of the best ``rank_uncertainty`` is about.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: Literal["expected_improvement", "upper_bound", "rank_uncertainty", "thompson", "random"] = (
        "expected_improvement"
    )
    batch: int = Field(5, ge=1)
    exploration: float = Field(1.0, ge=0)
    top: int = Field(10, ge=1)


def next_trainings(
    predictor: Predictor,
    features: Floats,
    values: Floats,
    acquisition: Acquisition,
    *,
    seed: int,
    excluded: Bools | None = None,
    progress: Progress | None = None,
) -> list[int]:
    """Return the rows to train next, the most wanted first; all that are left if these are fewer than a batch.

    Only the order of what was trained counts: on a scale on which bad trainings lie far below all others, what is known
    to be bad would be the least certain, and so be wanted.

    Args:
        predictor: What is fitted to those that are trained.
        features: Shape (architectures, features).
        values: What training reached, larger is better; NaN where there was none. Shape (architectures,).
        acquisition: How to choose. Before there are trainings enough for a predictor, it is at random.
        seed: Of the fits and what is drawn.
        excluded: Rows that are not chosen either, such as trainings that collapsed.
        progress: Where it is told.
    """
    trained = np.isfinite(values)
    open_rows = np.isnan(values) if excluded is None else np.isnan(values) & ~excluded
    count = min(acquisition.batch, int(open_rows.sum()))
    if acquisition.strategy == "random" or trained.sum() < FEWEST:
        return [int(row) for row in np.random.default_rng(seed).permutation(np.flatnonzero(open_rows))[:count]]
    believed = np.full(len(values), np.nan)
    believed[trained] = NormalScores.of(values[trained]).scores
    if acquisition.strategy == "thompson" and count:
        return _drawn(predictor.fit(features[trained], believed[trained], seed), features, open_rows, count, seed)
    chosen: list[int] = []
    with (progress or SilentProgress()).work("next trainings", count) as bar:
        for _ in range(count):
            known = np.isfinite(believed)
            fitted = predictor.fit(features[known], believed[known], seed)
            left = np.flatnonzero(open_rows & ~known)
            prediction = fitted.predict(features[left])
            wanted = _wanted(prediction, believed[known], acquisition, seed)
            place = np.lexsort((prediction.mean, wanted))[-1]  # where nothing is unsure, the best
            row = int(left[place])
            believed[row] = prediction.mean[place]
            chosen.append(row)
            bar.advance()
    return chosen


def expected_improvement(prediction: Prediction, best: float) -> Floats:
    """Return by how much each architecture is expected to be better than the best, where worse counts as nothing."""
    deviation = np.maximum(prediction.deviation, np.finfo(np.float64).tiny)
    lead = prediction.mean - best
    certainty = np.clip(lead / deviation, -_CERTAIN, _CERTAIN)
    density = np.exp(-0.5 * certainty**2) / np.sqrt(2 * np.pi)
    improvement: Floats = np.maximum(0.0, lead * ndtr(certainty) + deviation * density)
    return improvement


def chance_to_be_among(prediction: Prediction, others: Floats, top: int, *, seed: int) -> Floats:
    """Return each architecture's chance to belong to the best, of itself and all others, shape (architectures,).

    Args:
        prediction: What is thought of those that are not trained.
        others: Values of those that are.
        top: How many the best are.
        seed: Of the draws.
    """
    noise = np.random.default_rng(seed).normal(size=(_DRAWS, len(prediction.mean)))
    drawn = prediction.mean + prediction.deviation * noise
    everything = np.column_stack([drawn, np.broadcast_to(others, (_DRAWS, len(others)))])
    place = everything.shape[1] - min(top, everything.shape[1])
    border = np.partition(everything, place, axis=1)[:, place]
    chances: Floats = (drawn >= border[:, None]).mean(axis=0)
    return chances


def replay(
    predictor: Predictor,
    features: Floats,
    truth: Floats,
    acquisition: Acquisition,
    *,
    start: int,
    trainings: int,
    seed: int,
) -> Ints:
    """Return the rows in the order in which they would have been trained, where all trainings are known beforehand.

    Args:
        predictor: What is fitted.
        features: Shape (architectures, features).
        truth: What training reaches, shape (architectures,); all finite.
        acquisition: How to choose.
        start: How many are trained first, at random.
        trainings: How many are trained in all.
        seed: Of all that is drawn; equal ones start from the same architectures.
    """
    order = [int(row) for row in np.random.default_rng(seed).permutation(len(truth))[:start]]
    trainings = min(trainings, len(truth))
    while len(order) < trainings:
        values = np.full(len(truth), np.nan)
        values[order] = truth[order]
        order += next_trainings(predictor, features, values, acquisition, seed=seed + len(order))
    return np.array(order[:trainings])


def _drawn(fitted: Fitted, features: Floats, open_rows: Bools, count: int, seed: int) -> list[int]:
    """Return for each of some draws the row that is best in it, of those that were not before."""
    left = np.flatnonzero(open_rows)
    prediction = fitted.predict(features[left])
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for _ in range(count):
        drawn = generator.normal(prediction.mean, prediction.deviation)
        drawn[np.isin(left, chosen)] = -np.inf
        chosen.append(int(left[np.argmax(drawn)]))
    return chosen


def _wanted(prediction: Prediction, known: Floats, acquisition: Acquisition, seed: int) -> Floats:
    if acquisition.strategy == "upper_bound":
        return prediction.mean + acquisition.exploration * prediction.deviation
    if acquisition.strategy == "rank_uncertainty":
        chances = chance_to_be_among(prediction, known, acquisition.top, seed=seed)
        return chances * (1 - chances)
    return expected_improvement(prediction, float(known.max()))
