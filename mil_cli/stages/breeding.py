"""Evolutionary search: the best candidate under a bound, by scores that each cost seconds; anytime and resumable.

Every generation follows from the seed and what was scored before it, so that a search that goes on after a kill does
what it would have done without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

Candidate = tuple[int, ...]
"""What a search inside a model chooses: by axis of its space, the index of a choice."""

Bred = TypeVar("Bred")
"""A candidate of any kind: a `Candidate`, or an architecture of a designed space."""


class Breedable(Protocol[Bred]):
    """A space whose candidates can be drawn, changed and crossed."""

    @property
    def smallest(self) -> Bred:
        """The candidate that costs least."""
        ...

    def sample(self, generator: torch.Generator, /) -> Bred:
        """Draw a candidate."""
        ...

    def mutate(self, candidate: Bred, generator: torch.Generator, /, *, probability: float) -> Bred:
        """Return a candidate with some axes drawn anew, each with the probability given, at least one."""
        ...

    def cross(self, first: Bred, second: Bred, generator: torch.Generator, /) -> Bred:
        """Return a candidate that has each axis from one of two."""
        ...


_TRIES = 100
"""Draws for one candidate within the bound before the lower limit on its cost is given up, and again to give up."""

_FILLED = 0.7
"""Random candidates use at least this share of the bound: smaller nets are seldom better."""

_MUTATED = 0.15
_PARENTS = 0.25


@dataclass(frozen=True)
class Scored:
    """A candidate that was scored.

    Attributes:
        candidate: The candidate.
        quality: Its quality on val.
        cost: What the bound is on.
    """

    candidate: Candidate
    quality: float
    cost: float


def evolve(
    space: Breedable[Candidate],
    *,
    cost: Callable[[Candidate], float],
    bound: float,
    score: Callable[[Candidate], float],
    higher_is_better: bool,
    evaluations: int,
    population: int,
    generator: Callable[[str], torch.Generator],
    first: Sequence[Candidate] = (),
    known: Sequence[Scored] = (),
    on_scored: Callable[[list[Scored]], None] = lambda scored: None,
) -> list[Scored]:
    """Score candidates, each generation bred from the best so far, and return all that were scored, the best first.

    Real et al. 2019, "Regularized Evolution for Image Classifier Architecture Search", for the loop; as in Cai et al.
    2020, "Once-for-All", children are mutations and crossings of the best quarter, and only candidates within the
    bound are scored. (`mil_cli.stages.nas.search.evolution` is the one in which the oldest dies.)

    Args:
        space: The space.
        cost: What the bound is on; cheap.
        bound: Largest cost.
        score: The quality of a candidate; expensive.
        higher_is_better: Whether a higher quality is better.
        evaluations: How many candidates are scored in all.
        population: How many of them are drawn at random first, and how many each generation breeds.
        generator: Gives a random generator for a purpose; the same one each time.
        first: Candidates of the first generation, before it is filled with random ones.
        known: What an interrupted search had scored, in its order.
        on_scored: Called after each score with all so far, in their order.

    Returns:
        What was scored: the best first, of equal ones the cheaper; empty if no candidate is within the bound.
    """
    scored = list(known)
    remembered = {entry.candidate: entry for entry in known}
    seen: set[Candidate] = set()
    in_order: list[Scored] = []
    generation = 0
    while len(in_order) < evaluations:
        size = min(population, evaluations - len(in_order))
        breed = _Breeder(space, cost, bound, generator(f"generation {generation}"))
        if generation == 0:
            children = breed.given(first, size, seen)
            children += breed.random(size - len(children), seen) if len(children) < size else []
        else:
            parents = ranked(in_order, higher_is_better)[: max(2, round(_PARENTS * population))]
            children = breed.children([parent.candidate for parent in parents], size, seen)
        if not children:
            break
        for child in children:
            entry = remembered.get(child)
            if entry is None:
                entry = Scored(child, score(child), cost(child))
                scored.append(entry)
                on_scored(scored)
            in_order.append(entry)
        generation += 1
    return ranked(in_order, higher_is_better)


def ranked(scored: Sequence[Scored], higher_is_better: bool) -> list[Scored]:
    """Return what was scored, the best first; of equal ones the cheaper."""
    sign = -1.0 if higher_is_better else 1.0
    return sorted(scored, key=lambda entry: (sign * entry.quality, entry.cost, entry.candidate))


class _Breeder:
    """Draws candidates that are within the bound and new.

    Args:
        space: The space.
        cost: What the bound is on.
        bound: Largest cost.
        generator: Where chance comes from.
    """

    def __init__(
        self, space: Breedable[Candidate], cost: Callable[[Candidate], float], bound: float, generator: torch.Generator
    ) -> None:
        self._space = space
        self._cost = cost
        self._bound = bound
        self._generator = generator

    def given(self, candidates: Sequence[Candidate], size: int, seen: set[Candidate]) -> list[Candidate]:
        """Return those of some candidates that are within the bound, each once."""
        found = [one for one in dict.fromkeys(candidates) if one not in seen and self._cost(one) <= self._bound][:size]
        seen.update(found)
        return found

    def random(self, size: int, seen: set[Candidate]) -> list[Candidate]:
        """Return new random candidates; the smallest one too, if it alone fits."""
        found = self._collect(size, seen, lambda: self._space.sample(self._generator))
        smallest = self._space.smallest
        if not found and smallest not in seen and self._cost(smallest) <= self._bound:
            seen.add(smallest)
            found.append(smallest)
        return found

    def children(self, parents: Sequence[Candidate], size: int, seen: set[Candidate]) -> list[Candidate]:
        """Return new candidates bred from parents."""

        def breed() -> Candidate:
            first, second = (parents[self._draw(len(parents))] for _ in range(2))
            child = self._space.cross(first, second, self._generator) if self._draw(2) else first
            return self._space.mutate(child, self._generator, probability=_MUTATED)

        return self._collect(size, seen, breed)

    def _collect(self, size: int, seen: set[Candidate], draw: Callable[[], Candidate]) -> list[Candidate]:
        found: list[Candidate] = []
        for least in (_FILLED * self._bound, 0.0):
            tries = 0
            while len(found) < size and tries < _TRIES * size:
                tries += 1
                candidate = draw()
                if candidate not in seen and least <= self._cost(candidate) <= self._bound:
                    seen.add(candidate)
                    found.append(candidate)
        return found

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._generator))


def with_choice(candidate: Candidate, place: int, choice: int) -> Candidate:
    """Return a candidate with another choice at one place."""
    return (*candidate[:place], choice, *candidate[place + 1 :])


def to_state(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Return what was scored in the form that a checkpoint keeps."""
    return [{"candidate": list(entry.candidate), "quality": entry.quality, "cost": entry.cost} for entry in scored]


def from_state(state: Sequence[Mapping[str, Any]]) -> list[Scored]:
    """Return what a checkpoint kept."""
    return [Scored(tuple(entry["candidate"]), entry["quality"], entry["cost"]) for entry in state]
