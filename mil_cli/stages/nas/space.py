"""The elastic space of a captured model: how far each width, each chain of residual branches and its images can shrink.

A candidate says for every width how many of its coupled classes it keeps, for every chain how many branches, and how
large the images are that it sees, as indices into the choices; 0 keeps everything. Of classes and branches the most
important come first, so that a candidate is a prefix of the whole model everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from mil_cli.errors import ModelError
from mil_cli.graph.coupling import Coupling, analyse, repair, step_of
from mil_cli.graph.model import Model
from mil_cli.graph.residual import ResidualBranch
from mil_cli.graph.resolution import at_resolution, first_image
from mil_cli.stages.breeding import Candidate

_SPREAD = 0.35
"""How far, as a share of an axis's choices, a random candidate strays from its common level."""


@dataclass(frozen=True)
class Width:
    """One set of coupled classes: channels, heads, a head's size, hidden units.

    Attributes:
        name: The weight from which the set was found.
        space: Its number in the analysis.
        choices: How many classes may be kept, all of them first.
    """

    name: str
    space: int
    choices: tuple[int, ...]


@dataclass(frozen=True)
class Depth:
    """One chain of residual branches.

    Attributes:
        name: The node at which the chain begins.
        branches: The branches, the most important first.
        choices: How many may be kept, all of them first.
    """

    name: str
    branches: tuple[ResidualBranch, ...]
    choices: tuple[int, ...]


@dataclass(frozen=True)
class Resolution:
    """How large the images are that a net sees.

    Attributes:
        name: The input whose images they are, the first one of several.
        choices: Their heights, the whole one first.
        couplings: For each height the analysis of the model that shrinks its images to it; their spaces are the same.
    """

    name: str
    choices: tuple[int, ...]
    couplings: tuple[Coupling, ...]


@dataclass(frozen=True)
class ElasticSpace:
    """All smaller nets that a model holds.

    Attributes:
        coupling: The analysis of the model.
        widths: Its widths.
        depths: Its chains of residual branches.
        resolution: The sizes of its images; None: they stay as they are.
    """

    coupling: Coupling
    widths: tuple[Width, ...]
    depths: tuple[Depth, ...]
    resolution: Resolution | None = None

    @cached_property
    def axes(self) -> tuple[Width | Depth | Resolution, ...]:
        """The widths, then the depths, then the resolution: what the places of a candidate stand for."""
        return (*self.widths, *self.depths, *([] if self.resolution is None else [self.resolution]))

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        """The analyses of the model, by the choice of resolution."""
        return (self.coupling,) if self.resolution is None else self.resolution.couplings

    def resolution_choice(self, candidate: Candidate) -> int:
        """Return a candidate's choice of resolution: an index into `couplings`."""
        return 0 if self.resolution is None else candidate[-1]

    def coupling_of(self, candidate: Candidate) -> Coupling:
        """Return the analysis of the model on images as large as a candidate sees them."""
        return self.couplings[self.resolution_choice(candidate)]

    @property
    def largest(self) -> Candidate:
        """The whole model."""
        return (0,) * len(self.axes)

    @cached_property
    def last(self) -> Candidate:
        """The last choice of every axis."""
        return tuple(len(axis.choices) - 1 for axis in self.axes)

    @cached_property
    def smallest(self) -> Candidate:
        """The candidate that keeps least everywhere."""
        return self.canonical(self.last)

    def allows(self, candidate: Candidate) -> bool:
        """Whether there is such a candidate: all choices go together."""
        return all(0 <= choice <= most for choice, most in zip(candidate, self.last, strict=True))

    @cached_property
    def size(self) -> int:
        """How many candidates there are, counting those that differ only in what they leave out."""
        return math.prod(len(axis.choices) for axis in self.axes)

    @cached_property
    def _readers(self) -> list[frozenset[str]]:
        """By width: the calls that read a weight of it."""
        return [self.coupling.readers(width.space) for width in self.widths]

    def _depth_choices(self, candidate: Candidate) -> Candidate:
        return candidate[len(self.widths) : len(self.widths) + len(self.depths)]

    def branches(self, candidate: Candidate) -> list[ResidualBranch]:
        """Return the branches that a candidate leaves out."""
        return [
            branch
            for depth, choice in zip(self.depths, self._depth_choices(candidate), strict=True)
            for branch in depth.branches[depth.choices[choice] :]
        ]

    def dropped(self, candidate: Candidate) -> frozenset[str]:
        """Return the names of the calls that do not run in a candidate, because their branch is left out."""
        return frozenset[str]().union(*(branch.nodes for branch in self.branches(candidate)))

    def removed(self, candidate: Candidate) -> dict[int, set[int]]:
        """Return the classes that a candidate cuts, by space."""
        wanted = {
            width.space: set(self.coupling.spaces[width.space].free[-lost:])
            for width, choice in zip(self.widths, candidate, strict=False)
            if (lost := width.choices[0] - width.choices[choice])
        }
        return repair(self.coupling, wanted)

    def canonical(self, candidate: Candidate) -> Candidate:
        """Return the one form of all candidates that are the same net: what is left out is whole."""
        dropped = self.dropped(candidate)
        if not dropped:
            return candidate
        widths = (
            0 if readers <= dropped else choice for readers, choice in zip(self._readers, candidate, strict=False)
        )
        left_out = self.branches(candidate)
        depths = (
            0 if any(outer.holds(branch) for outer in left_out for branch in depth.branches) else choice
            for depth, choice in zip(self.depths, self._depth_choices(candidate), strict=True)
        )
        return (*widths, *depths, *candidate[len(self.widths) + len(self.depths) :])

    def sample(self, generator: torch.Generator) -> Candidate:
        """Draw a candidate around a level that is drawn first, so that small and large nets are as likely as middling.

        Drawing every axis by itself would give candidates of nearly the same size.
        """
        level = float(torch.rand((), generator=generator))
        stray = torch.rand(len(self.axes), generator=generator).tolist()
        candidate = []
        for axis, draw in zip(self.axes, stray, strict=True):
            place = min(max(level + _SPREAD * (2 * draw - 1), 0.0), 1.0)
            candidate.append(round(place * (len(axis.choices) - 1)))
        return self.canonical(tuple(candidate))

    def mutate(self, candidate: Candidate, generator: torch.Generator, *, probability: float) -> Candidate:
        """Return a candidate some of whose axes are drawn anew, each with the probability given, at least one."""
        draws = torch.rand(len(self.axes), generator=generator)
        chosen = set((draws < probability).nonzero().flatten().tolist()) or {int(draws.argmin())}
        changed = [
            int(torch.randint(len(axis.choices), (), generator=generator)) if place in chosen else candidate[place]
            for place, axis in enumerate(self.axes)
        ]
        return self.canonical(tuple(changed))

    def cross(self, first: Candidate, second: Candidate, generator: torch.Generator) -> Candidate:
        """Return a candidate that has each axis from one of two."""
        coins = torch.rand(len(self.axes), generator=generator).tolist()
        return self.canonical(tuple(a if coin < 0.5 else b for a, b, coin in zip(first, second, coins, strict=True)))

    def describe(self, candidate: Candidate) -> dict[str, list[dict[str, object]]]:
        """Return what a candidate keeps of each width, each depth and the images' height; JSON-able."""
        removed = self.removed(candidate)  # not the choices: what shares an axis may have to be given back
        widths: list[dict[str, object]] = [
            {"name": width.name, "kept": width.choices[0] - len(removed.get(width.space, ())), "of": width.choices[0]}
            for width in self.widths
        ]
        depths: list[dict[str, object]] = [
            {"name": depth.name, "kept": depth.choices[choice], "of": depth.choices[0]}
            for depth, choice in zip(self.depths, self._depth_choices(candidate), strict=True)
        ]
        found = {"widths": widths, "depths": depths}
        if (images := self.resolution) is not None:
            height = images.choices[self.resolution_choice(candidate)]
            found["resolutions"] = [{"name": images.name, "kept": height, "of": images.choices[0]}]
        return found


def widths_of(coupling: Coupling, *, smallest: float, multiple: int, most: int) -> tuple[Width, ...]:
    """Return the widths of a model that can shrink.

    Args:
        coupling: Its analysis.
        smallest: Smallest share of a width that may be kept.
        multiple: What the axes of a smaller width end on.
        most: Most choices of a width; they are spread evenly.
    """
    found = []
    for number, space in enumerate(coupling.spaces):
        step = step_of(space, multiple)
        least = max(math.ceil(space.size * smallest - 1e-9), len(space.frozen), 1)
        smaller = [width for width in range(space.size - 1, least - 1, -1) if width % step == 0]
        if smaller:
            choices = (space.size, *_spread(smaller, most - 1))
            found.append(Width(space.origin, number, choices))
    return tuple(found)


def depths_of(
    chains: Sequence[Sequence[ResidualBranch]], importance: Mapping[str, float], *, smallest: float
) -> tuple[Depth, ...]:
    """Return the chains of residual branches that can shrink.

    Args:
        chains: The chains.
        importance: By the name of a branch's addition: what leaving it out costs.
        smallest: Smallest share of a chain that may be kept; one branch always is.
    """
    found = []
    for chain in chains:
        least = max(math.ceil(len(chain) * smallest - 1e-9), 1)
        if least < len(chain):
            ordered = tuple(sorted(chain, key=lambda branch: -importance[branch.addition]))
            found.append(Depth(chain[0].addition, ordered, tuple(range(len(chain), least - 1, -1))))
    return tuple(found)


def resolution_of(model: Model, coupling: Coupling, *, smallest: float, most: int) -> Resolution:
    """Return the sizes of a model's images that can be chosen from.

    Heights end on as much as strides may want of them: a power of two that divides the whole height, an eighth of it
    at most.

    Args:
        model: The model.
        coupling: Its analysis.
        smallest: Smallest share of its images' height and width.
        most: Most heights; they are spread evenly.

    Raises:
        ModelError: The model takes no images, or runs on none that are smaller.
    """
    height = first_image(model).shape[2]
    step = math.gcd(height, 2 ** int(math.log2(max(height / 8, 1))))
    least = max(math.ceil(height * smallest - 1e-9), 1)
    smaller = [size for size in range(height - 1, least - 1, -1) if size % step == 0]
    found: dict[int, Coupling] = {height: coupling}
    refused = ModelError("no smaller images are allowed", value=smallest, hint="lower the smallest share")
    for size in _spread(smaller, most - 1):
        try:
            shrunk = analyse(at_resolution(model, size / height))
        except ModelError as error:
            refused = error
        else:
            if _same_spaces(shrunk, coupling):
                found[size] = shrunk
    if len(found) == 1:
        raise refused
    return Resolution(first_image(model).name, tuple(found), tuple(found.values()))


def _same_spaces(one: Coupling, other: Coupling) -> bool:
    """Whether two analyses found the same: the same classes of the same weights, of which the same can be cut."""
    return len(one.spaces) == len(other.spaces) and all(
        (a.origin, a.size, a.free) == (b.origin, b.size, b.free)
        and len(a.members) == len(b.members)
        and all(
            (x.parameter, x.axis) == (y.parameter, y.axis) and np.array_equal(x.classes, y.classes)
            for x, y in zip(a.members, b.members, strict=True)
        )
        for a, b in zip(one.spaces, other.spaces, strict=True)
    )


def _spread(choices: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of some choices, evenly spread, the first and the last among them."""
    if len(choices) <= most:
        return list(choices)
    if most == 1:
        return [choices[-1]]
    return [choices[round(place * (len(choices) - 1) / (most - 1))] for place in range(most)]
