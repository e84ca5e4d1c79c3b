"""The latency of architectures of a designed space, predicted from the work that they do and some that are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import nnls

from mil_cli.assess.prediction import FEWEST, out_of_fold
from mil_cli.assess.predictors.base import Prediction
from mil_cli.assess.ranking import Floats
from mil_cli.graph.model import Model
from mil_cli.spaces import Architecture, CostCounter, DesignedSpace
from mil_cli.spaces.balanced import draw_balanced
from mil_cli.stages.measured import latency_ratios, latency_seconds

if TYPE_CHECKING:
    from mil_cli.stages.context import Context

_TOGETHER = 8
"""Architectures that are timed side by side in one process, and then kept in the checkpoint."""

_DRAWS = 10
"""Most draws for each of them; ranges of operations that are seldom met are made up for by others."""

_FOLDS, _REPEATS = 5, 4

_SHOWN = 0.9
"""Below which error this share of architectures lies is told beside the median."""


@dataclass(frozen=True)
class WorkRegression:
    """Latency as a sum over kinds of work, each of which takes no less than no time.

    What is minimised is the relative error, by non-negative least squares (Lawson and Hanson 1974, "Solving least
    squares problems"), which leaves most kinds out where few architectures are measured.
    """

    def fit(self, features: Floats, values: Floats, seed: int) -> FittedWork:
        """Learn from measured architectures; nothing is drawn.

        Args:
            features: The work of each, shape (architectures, kinds).
            values: Their latencies, shape (architectures,); above 0.
            seed: Not used.
        """
        columns = _with_overhead(features)
        largest = np.maximum(columns.max(axis=0), np.finfo(np.float64).tiny)
        found, _ = nnls(columns / largest / values[:, None], np.ones(len(values)))
        weights = found / largest
        freedom = max(1, len(values) - int((found > 0).sum()))
        error = float(np.sqrt(np.sum((columns @ weights / values - 1) ** 2) / freedom))
        return FittedWork(weights, error)


@dataclass(frozen=True, eq=False)
class FittedWork:
    """A regression that was fitted.

    Attributes:
        weights: Of each kind of work and of one run whatever it does, shape (kinds + 1,).
        error: The standard deviation of the relative error.
    """

    weights: Floats
    error: float

    def predict(self, features: Floats) -> Prediction:
        """Return the latencies of architectures by their work, shape (architectures, kinds)."""
        mean = _with_overhead(features) @ self.weights
        return Prediction(mean, self.error * mean)


class PredictedLatency:
    """Predicts the seconds of architectures, by the work that they do.

    Chu et al. 2020, "FairNAS" and others look operators up in a table; whole architectures that are measured have in
    them what a runtime merges and how its layouts follow each other.

    Args:
        space: The space.
        counter: Counts work.
        build: Gives an architecture as a model.
        original: What architectures are timed beside.
        context: Gives the device, samples, progress and the checkpoint.
        samples: How many architectures are measured, spread evenly over their operations.

    Attributes:
        seconds: What the original takes.

    Raises:
        ExportError: An architecture cannot be exported.
        MeasureError: The runtime failed on a file.
    """

    def __init__(
        self,
        space: DesignedSpace,
        counter: CostCounter,
        *,
        build: Callable[[Architecture], Model],
        original: Model,
        context: Context,
        samples: int,
    ) -> None:
        self._space, self._counter = space, counter
        slot = context.slot("latency")
        state: dict[str, Any] = slot.load() or {"seconds": latency_seconds(original, context), "ratios": []}
        drawn = _drawn(space, counter, context, samples)
        ratios: list[float] = state["ratios"]
        with context.progress.work(f"{context.name}: measuring latencies", len(drawn), done=len(ratios)) as bar:
            while len(ratios) < len(drawn):
                some = [build(one) for one in drawn[len(ratios) : len(ratios) + _TOGETHER]]
                ratios += latency_ratios(some, original, context)
                slot.save(state)
                bar.advance(len(some))
        self.seconds: float = state["seconds"]
        self._kinds = sorted({kind for one in drawn for kind in counter.work(one)})
        self._features = np.array([self._work(one) for one in drawn])
        self._values = self.seconds * np.array(ratios)
        self._fitted = WorkRegression().fit(self._features, self._values, context.seed)
        self._seed = context.seed

    def __call__(self, architecture: Architecture) -> float:
        """Return the predicted seconds of an architecture."""
        return float(self._fitted.predict(np.array([self._work(architecture)])).mean[0])

    def describe(self) -> dict[str, Any]:
        """Return how many were measured, how far predictions were off for those held out, and what work takes.

        A space of few architectures has all of them measured, and none to hold out.
        """
        names = [*self._kinds, "run"]
        return {
            "measured": len(self._values),
            **(self._errors() if len(self._values) >= FEWEST else {}),
            "seconds": {name: float(one) for name, one in zip(names, self._fitted.weights, strict=True) if one > 0},
        }

    def _errors(self) -> dict[str, float]:
        held = out_of_fold(
            WorkRegression(), self._features, self._values, folds=_FOLDS, repeats=_REPEATS, seed=self._seed
        )
        errors = np.abs(held.mean / self._values - 1).ravel()
        return {
            "median_error": float(np.median(errors)),
            f"error_of_{100 * _SHOWN:.0f}_percent": float(np.quantile(errors, _SHOWN)),
        }

    def _work(self, architecture: Architecture) -> list[int]:
        work = self._counter.work(architecture)
        return [work.get(kind, 0) for kind in self._kinds]


def _with_overhead(features: Floats) -> Floats:
    return np.column_stack([features, np.ones(len(features))])


def _drawn(space: DesignedSpace, counter: CostCounter, context: Context, count: int) -> Sequence[Architecture]:
    """Return the smallest and the largest architecture, and others spread evenly over their operations."""
    ends = [space.smallest, space.largest]
    low, high = map(counter.macs, ends)
    if not low < high:
        return space.unique(ends)
    generator = context.generator("latency")
    between = draw_balanced(space, counter.macs, generator, count=count, low=low, high=high, tries=_DRAWS)
    return space.unique([*ends, *between])[:count]
