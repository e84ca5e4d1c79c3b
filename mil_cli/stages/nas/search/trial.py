"""What a search asks to be scored, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np

from mil_cli.stages.breeding import Breedable

C = TypeVar("C", bound=Hashable)


class SearchSpace(Breedable[C], Protocol[C]):
    """A space whose candidates can be bred, compared, kept in a file, and put into numbers."""

    def form(self, architecture: C, /) -> Hashable:
        """Return what is equal for candidates that are the same net."""
        ...

    def indices(self, architecture: C, /) -> tuple[int, ...]:
        """Return a candidate as numbers that a checkpoint keeps."""
        ...

    def at(self, indices: Sequence[int], /) -> C:
        """Return the candidate that `indices` gave numbers for."""
        ...

    def encode(self, architecture: C, /) -> np.ndarray:
        """Return what a predictor reads of a candidate, shape (features,)."""
        ...


Score: TypeAlias = Callable[[C, float], float]
"""Gives the quality of a candidate on which a share of the whole effort, above 0 and at most 1, is spent.

An infinity or NaN is that of one that has none. Where a search runs in several processes, it can be pickled.
"""


@dataclass(frozen=True)
class Proposal(Generic[C]):
    """What is to be scored.

    Attributes:
        candidate: The candidate.
        fidelity: Which share of the whole effort is spent on it.
    """

    candidate: C
    fidelity: float = 1.0


@dataclass(frozen=True)
class Trial(Generic[C]):
    """A candidate that was scored.

    Attributes:
        candidate: The candidate.
        fidelity: Which share of the whole effort was spent on it.
        quality: Its quality.
        worth: The same with larger being better; minus infinity where it has none.
        costs: Its costs by name.
        batch: The number of the proposals that it was among.
    """

    candidate: C
    fidelity: float
    quality: float
    worth: float
    costs: Mapping[str, float]
    batch: int


def worth_of(quality: float, *, higher_is_better: bool) -> float:
    """Return a quality with larger being better; minus infinity for one that is not finite."""
    if not math.isfinite(quality):
        return -math.inf
    return quality if higher_is_better else -quality


def ranked(trials: Iterable[Trial[C]]) -> list[Trial[C]]:
    """Return trials, the best first: those on which more was spent, then the better ones, of equal ones the cheaper.

    What was scored with less effort is not comparable with what was scored with more.
    """
    return sorted(trials, key=_rank)


def best_of(trials: Iterable[Trial[C]]) -> Trial[C]:
    """Return the first of `ranked`."""
    return min(trials, key=_rank)


def _rank(trial: Trial[C]) -> tuple[float, float, tuple[float, ...]]:
    return -trial.fidelity, -trial.worth, tuple(trial.costs.values())
