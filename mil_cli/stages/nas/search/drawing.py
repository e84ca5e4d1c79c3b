"""Draws candidates that are new and keep the bounds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic

import torch

from mil_cli.stages.nas.search.bounds import Bounds
from mil_cli.stages.nas.search.trial import C, SearchSpace

_TRIES = 100
"""Draws in a row that give no new candidate, before fewer are given than were asked for."""

_CROSSINGS = 8
"""How often a candidate above a bound is crossed with the smallest one: about half of what is left goes each time."""


class Drawing(Generic[C]):
    """Draws candidates that keep the bounds, and are neither the same net as another one drawn nor as one scored.

    Args:
        space: The space.
        bounds: What they keep.
        generator: Where chance comes from.
        seen: The forms of those that are not drawn again; what is drawn is added.
        first: Candidates that come before random ones.

    Attributes:
        generator: The same.
    """

    def __init__(
        self,
        space: SearchSpace[C],
        bounds: Bounds[C],
        generator: torch.Generator,
        seen: set[Hashable],
        first: Sequence[C] = (),
    ) -> None:
        self._space, self._bounds, self._seen, self._first = space, bounds, seen, first
        self.generator = generator

    def random(self, count: int) -> list[C]:
        """Return so many random candidates, or as many as are met; the smallest one if it is the only one."""
        found = self.first(count)
        if len(found) < count:
            found += self.new(count - len(found), lambda: self._space.sample(self.generator))
        return found or self.given([self._space.smallest], count)

    def first(self, count: int) -> list[C]:
        """Return at most so many of those that come before random ones."""
        return self.given(self._first, count)

    def new(self, count: int, draw: Callable[[], C]) -> list[C]:
        """Return so many candidates that a function draws, or as many as are met; costly ones are made cheaper.

        Args:
            count: How many.
            draw: Gives a candidate, another one each time.
        """
        found: list[C] = []
        failed = 0
        while len(found) < count and failed < _TRIES:
            drawn = self.given([self._cheapened(draw())], 1)
            found += drawn
            failed = 0 if drawn else failed + 1
        return found

    def given(self, candidates: Iterable[C], count: int) -> list[C]:
        """Return at most so many of some candidates, those that are new and keep the bounds."""
        found: list[C] = []
        for candidate in candidates:
            if len(found) == count:
                break
            if self._bounds.within(candidate) and (form := self._space.form(candidate)) not in self._seen:
                self._seen.add(form)
                found.append(candidate)
        return found

    def place(self, count: int) -> int:
        """Draw a number below another."""
        return int(torch.randint(count, (), generator=self.generator))

    def chance(self, probability: float) -> bool:
        """Return whether something of a probability happens."""
        return float(torch.rand((), generator=self.generator)) < probability

    def _cheapened(self, candidate: C) -> C:
        for _ in range(_CROSSINGS):
            if self._bounds.within(candidate):
                break
            candidate = self._space.cross(candidate, self._space.smallest, self.generator)
        return candidate
