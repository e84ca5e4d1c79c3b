"""A space of tuples whose best candidate is known by brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from mil_cli.stages.nas.search.bounds import Bound, Bounds

PLACES, CHOICES = 7, 5
GAINS = torch.rand((PLACES, CHOICES), generator=torch.Generator().manual_seed(1)).tolist()

Candidate = tuple[int, ...]


class Tuples:
    """At each place one of several choices; where the first is 0, the second changes nothing."""

    smallest = (0,) * PLACES
    largest = (CHOICES - 1,) * PLACES

    def sample(self, generator: torch.Generator) -> Candidate:
        return tuple(torch.randint(CHOICES, (PLACES,), generator=generator).tolist())

    def mutate(self, candidate: Candidate, generator: torch.Generator, *, probability: float) -> Candidate:
        draws = torch.rand(PLACES, generator=generator)
        moved = set((draws < probability).nonzero().flatten().tolist()) or {int(draws.argmin())}
        steps = torch.randint(1, CHOICES, (PLACES,), generator=generator).tolist()
        return tuple((one + steps[place]) % CHOICES if place in moved else one for place, one in enumerate(candidate))

    def cross(self, first: Candidate, second: Candidate, generator: torch.Generator) -> Candidate:
        coins = torch.randint(2, (PLACES,), generator=generator).tolist()
        return tuple(pair[coin] for pair, coin in zip(zip(first, second, strict=True), coins, strict=True))

    def form(self, candidate: Candidate) -> Candidate:
        return (0, 0, *candidate[2:]) if candidate[0] == 0 else candidate

    def indices(self, candidate: Candidate) -> Candidate:
        return candidate

    def at(self, indices: Sequence[int]) -> Candidate:
        return tuple(indices)

    def encode(self, candidate: Candidate) -> np.ndarray:
        return np.eye(CHOICES)[list(self.form(candidate))].ravel()


SPACE = Tuples()


def quality(candidate: Candidate, fidelity: float = 1.0) -> float:
    """What each place adds; neighbours that are the same lose something; little effort hides some of the last."""
    chosen = SPACE.form(candidate)
    whole = sum(GAINS[place][index] + 0.3 * index for place, index in enumerate(chosen))
    whole -= 0.2 * sum(first == second for first, second in itertools.pairwise(chosen))
    return float(whole - (1 - fidelity) * (0.5 + 0.1 * chosen[-1]))


def macs(candidate: Candidate) -> float:
    return float(sum((1 + place % 3) * (1 + index) for place, index in enumerate(SPACE.form(candidate))))


def params(candidate: Candidate) -> float:
    return float(sum(1 + 2 * index for index in SPACE.form(candidate)))


def bounds(share: float = 0.6, *, most_params: float = math.inf) -> Bounds[Candidate]:
    return Bounds([Bound("macs", macs, share * macs(SPACE.largest)), Bound("params", params, most_params)])


@cache
def everything() -> dict[Candidate, tuple[float, float]]:
    """Return quality and operations of all nets."""
    every = {SPACE.form(one) for one in itertools.product(range(CHOICES), repeat=PLACES)}
    return {one: (quality(one), macs(one)) for one in every}


def best(most_macs: float) -> float:
    """Return the best quality under a bound on operations."""
    return max(quality for quality, macs in everything().values() if macs <= most_macs)
