"""Draws architectures spread evenly over what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from itertools import zip_longest
from typing import Protocol, TypeVar

import torch

from mil_cli.errors import ModelError
from mil_cli.spaces.architecture import Architecture
from mil_cli.spaces.space import DesignedSpace

Drawn = TypeVar("Drawn")


class Drawable(Protocol[Drawn]):
    """A space of which candidates can be drawn and compared, such as a `DesignedSpace`."""

    def sample(self, generator: torch.Generator, /) -> Drawn:
        """Draw a candidate."""
        ...

    def form(self, architecture: Drawn, /) -> Hashable:
        """Return what is equal for candidates that are the same net."""
        ...


def sample_balanced(
    space: DesignedSpace,
    cost: Callable[[Architecture], float],
    generator: torch.Generator,
    *,
    count: int,
    low: float,
    high: float,
    strata: int = 8,
    tries: int = 50,
) -> list[Architecture]:
    """Return architectures that differ, as many from each part of a range of costs, as far as so many are met.

    Drawing each decision by itself gives architectures of nearly the same cost. Here the range is cut into strata, and
    drawing goes on until each has its share; a stratum that is seldom met is made up for by the others.

    Args:
        space: The space.
        cost: What the range is of, such as `CostCounter.macs`.
        generator: Where chance comes from.
        count: How many architectures.
        low: Smallest cost that there may be.
        high: Largest cost that there may be, above `low`.
        strata: How many parts of equal length the range has.
        tries: Most draws, as a multiple of `count`.

    Returns:
        Architectures that are not the same plain module, one of each stratum after another.

    Raises:
        ModelError: The range is empty, or fewer within it were met.
    """
    if not low < high:
        raise ModelError("the largest cost must be above the smallest", value=(low, high))
    in_turn = draw_balanced(space, cost, generator, count=count, low=low, high=high, strata=strata, tries=tries)
    if len(in_turn) < count:
        raise ModelError(
            f"{len(in_turn)} different architectures between {low:,.6g} and {high:,.6g} were met, {count} are wanted",
            hint="ask for fewer, or widen the range",
        )
    return in_turn


def draw_balanced(
    space: Drawable[Drawn],
    cost: Callable[[Drawn], float],
    generator: torch.Generator,
    *,
    count: int,
    low: float,
    high: float,
    strata: int = 8,
    tries: int = 50,
    fits: Callable[[Drawn], bool] = lambda _: True,
) -> list[Drawn]:
    """Return what `sample_balanced` does, or fewer where fewer are met; its arguments are the same.

    `fits` is what is asked of an architecture beside its cost: it may take longer, and is asked of few.
    """
    kept: list[list[Drawn]] = [[] for _ in range(strata)]
    seen: set[Hashable] = set()
    for _ in range(tries * count):
        if all(len(stratum) * strata >= count for stratum in kept):
            break
        architecture = space.sample(generator)
        share = (cost(architecture) - low) / (high - low)
        if not 0 <= share <= 1:
            continue
        place = min(math.floor(share * strata), strata - 1)
        if len(kept[place]) == count:  # more of a stratum than all are never given
            continue
        if (form := space.form(architecture)) not in seen and fits(architecture):
            seen.add(form)
            kept[place].append(architecture)
    in_turn = [one for round_ in zip_longest(*kept) for one in round_ if one is not None]
    return in_turn[:count]
