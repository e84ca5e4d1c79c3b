"""What a ranking cost: everything that was computed for it, in seconds of processors and of the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from mil_cli.assess.table import Bools, Part, Table

Clock: TypeAlias = Literal["cpu", "wall"]

CLOCKS: tuple[Clock, ...] = ("cpu", "wall")


class Clocks(NamedTuple):
    """Seconds of this process's processors, and of the clock on the wall."""

    cpu: Callable[[], float] = time.process_time
    wall: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Spending:
    """Seconds that one part of a ranking took, of all architectures that have it.

    Attributes:
        architectures: How many have it.
        cpu: Seconds of processors, of those that say; None if none does.
        wall: Seconds that passed, likewise.
        cpu_unknown: How many do not say it.
        wall_unknown: Likewise.
    """

    architectures: int
    cpu: float | None
    wall: float | None
    cpu_unknown: int = 0
    wall_unknown: int = 0


@dataclass(frozen=True)
class Costs:
    """What a ranking cost.

    Attributes:
        scores: Scores without training.
        partial: Partial trainings.
        training: Whole trainings, which predictors learn from; those that collapsed too.
        fit: Fitting predictors, judging them, and choosing what to train next.
        cpu_of_training_all: What whole trainings of all architectures would take, by the mean of those that say: an
            estimate.
    """

    scores: Spending
    partial: Spending
    training: Spending
    fit: Spending
    cpu_of_training_all: float | None

    @property
    def parts(self) -> dict[str, Spending]:
        """Each part by its name."""
        return {"scores": self.scores, "partial": self.partial, "training": self.training, "fit": self.fit}

    def total(self, clock: Clock) -> float:
        """Return the seconds of all parts that say."""
        return sum(getattr(part, clock) or 0.0 for part in self.parts.values())

    @property
    def complete(self) -> bool:
        """Whether each architecture says the processor time of each part that it has."""
        return not any(part.cpu_unknown for part in self.parts.values())


def costs_of(table: Table, *, fit_cpu: float, fit_wall: float) -> Costs:
    """Return what a table's architectures took, and what was computed on it.

    Args:
        table: Says seconds of architectures.
        fit_cpu: Processor seconds of fitting.
        fit_wall: Seconds that fitting took.
    """
    columns = table.columns
    features, scores = len(columns.features), len(columns.scores)
    given = ~np.isnan(table.inputs)
    has_scores: Bools = np.logical_or.reduce(given[:, features : features + scores], axis=1)
    has_partial: Bools = np.logical_or.reduce(given[:, features + scores :], axis=1)
    one = table.spent("training", "cpu")[table.trained] / table.trainings[table.trained]
    said = one[~np.isnan(one)]
    return Costs(
        scores=_spending(table, "scores", has_scores),
        partial=_spending(table, "partial", has_partial),
        training=_spending(table, "training", table.trained),
        fit=Spending(int(table.known.sum()), fit_cpu, fit_wall),
        cpu_of_training_all=float(said.mean()) * len(table) if len(said) else None,
    )


def _spending(table: Table, part: Part, having: Bools) -> Spending:
    sums: list[float | None] = []
    unknown = []
    for clock in CLOCKS:
        seconds = table.spent(part, clock)[having]
        known = ~np.isnan(seconds)
        sums.append(float(seconds[known].sum()) if known.any() else None)
        unknown.append(int((~known).sum()))
    return Spending(int(having.sum()), sums[0], sums[1], unknown[0], unknown[1])
