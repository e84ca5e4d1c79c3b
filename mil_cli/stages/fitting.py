"""Candidates that use a bound: narrowed until they are within it, and widened as far as it allows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Protocol

import torch

from mil_cli.stages.breeding import Candidate, with_choice


class Narrowable(Protocol):
    """A space whose axes have their choices in order, each narrower than the one before."""

    @property
    def last(self) -> Candidate:
        """The last choice of every axis."""
        ...

    @property
    def smallest(self) -> Candidate:
        """The candidate that costs least."""
        ...

    def allows(self, candidate: Candidate) -> bool:
        """Whether there is such a candidate; what is wider than one that there is is allowed too."""
        ...

    def canonical(self, candidate: Candidate) -> Candidate:
        """Return the one form of all candidates that are the same net."""
        ...


class Fitting:
    """Fits candidates of one space to a bound.

    Args:
        space: The space.
        cost: What the bound is on.
        bound: Largest cost; the smallest candidate is within.
    """

    def __init__(self, space: Narrowable, cost: Callable[[Candidate], float], bound: float) -> None:
        self._space, self._cost, self._bound = space, cost, bound

    def shrunk(self, candidate: Candidate, generator: torch.Generator) -> Candidate:
        """Return a candidate within the bound: the given one after as few steps as are needed of a random sequence.

        Args:
            candidate: A candidate that the space allows.
            generator: Draws the sequence.
        """
        space = self._space
        paths = [candidate]
        for place in self._sequence(candidate, generator):
            step = with_choice(paths[-1], place, paths[-1][place] + 1)
            if space.allows(step):
                paths.append(step)
        low, high = 0, len(paths) - 1
        if self._cost(paths[high]) > self._bound:
            return space.smallest
        while low < high:
            middle = (low + high) // 2
            if self._cost(paths[middle]) <= self._bound:
                high = middle
            else:
                low = middle + 1
        return space.canonical(paths[low])

    def fitted(self, candidate: Candidate, generator: torch.Generator) -> Candidate:
        """Return a candidate that uses the bound: the given one, shrunk or widened by steps of a random sequence."""
        if self._cost(candidate) > self._bound:
            return self.shrunk(candidate, generator)
        for place in self._sequence(tuple(map(operator.sub, self._space.last, candidate)), generator):
            wider = with_choice(candidate, place, candidate[place] - 1)
            if self._cost(wider) <= self._bound:
                candidate = wider
        return self._space.canonical(candidate)

    def _sequence(self, candidate: Candidate, generator: torch.Generator) -> list[int]:
        """Return all axes in a random order, each as often as it can still be narrowed; a share of them goes first."""
        weights = torch.rand(len(candidate), generator=generator).tolist()
        steps = []
        for place, (choice, most) in enumerate(zip(candidate, self._space.last, strict=True)):
            times = torch.rand(most - choice, generator=generator).sort().values.tolist()
            steps += [(weights[place] * time, place) for time in times]
        return [place for _, place in sorted(steps)]
