"""Candidates that use a bound: narrowed until they are within it, and widened as far as it allows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch

from mil_cli.stages.breeding import Breedable, Candidate, with_choice


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
        self._space, self._bound = space, bound
        self._cost = cache(cost)  # small spaces meet the same candidates again and again

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
        """Return a candidate that uses the bound: the given one, shrunk if it must be, then widened while it can be.

        Args:
            candidate: A candidate that the space allows.
            generator: Draws the sequences of steps.
        """
        found = self.shrunk(candidate, generator)
        full: set[int] = set()  # a step that does not fit never will: others only widen
        for place in self._sequence(tuple(map(operator.sub, self._space.last, found)), generator):
            if place in full:
                continue
            wider = with_choice(found, place, found[place] - 1)
            if self._cost(wider) <= self._bound:
                found = wider
            else:
                full.add(place)
        return self._space.canonical(found)

    def _sequence(self, candidate: Candidate, generator: torch.Generator) -> list[int]:
        """Return all axes in a random order, each as often as it can still be narrowed; a share of them goes first."""
        weights = torch.rand(len(candidate), generator=generator).tolist()
        steps = []
        for place, (choice, most) in enumerate(zip(candidate, self._space.last, strict=True)):
            times = torch.rand(most - choice, generator=generator).sort().values.tolist()
            steps += [(weights[place] * time, place) for time in times]
        return [place for _, place in sorted(steps)]


class Filling:
    """A space whose candidates are fitted to a bound as they are drawn and bred, so that each uses what it may.

    Args:
        space: The space.
        fitting: Fits its candidates.
    """

    def __init__(self, space: Breedable[Candidate], fitting: Fitting) -> None:
        self._space, self._fitting = space, fitting

    @property
    def smallest(self) -> Candidate:
        """The candidate that costs least."""
        return self._space.smallest

    def sample(self, generator: torch.Generator) -> Candidate:
        """Draw a candidate."""
        return self._fitting.fitted(self._space.sample(generator), generator)

    def mutate(self, candidate: Candidate, generator: torch.Generator, *, probability: float) -> Candidate:
        """Return a candidate with some axes drawn anew, and others changed as the bound asks or allows."""
        return self._fitting.fitted(self._space.mutate(candidate, generator, probability=probability), generator)

    def cross(self, first: Candidate, second: Candidate, generator: torch.Generator) -> Candidate:
        """Return a candidate made of two."""
        return self._fitting.fitted(self._space.cross(first, second, generator), generator)
