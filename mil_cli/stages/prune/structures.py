"""The structures that a search can give a model: the widths of its coupled spaces, and which branches it leaves out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mil_cli.graph.coupling import Coupling, repair
from mil_cli.graph.residual import ResidualBranch
from mil_cli.stages.breeding import Candidate, with_choice

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.prune.amount import Measure


@dataclass(frozen=True)
class Width:
    """The classes of one space that can go, in chunks that keep its width on a multiple.

    Attributes:
        name: The weight from which the space was found.
        space: Its number in the analysis.
        size: How many classes it has.
        chunks: What goes, the least important first: the width with index ``k`` lacks the first ``k`` chunks.
    """

    name: str
    space: int
    size: int
    chunks: tuple[tuple[int, ...], ...]

    def kept(self, choice: int) -> int:
        """Return how many classes a choice keeps."""
        return self.size - sum(map(len, self.chunks[:choice]))


@dataclass(frozen=True)
class Limit:
    """How many branches of one chain may go.

    Attributes:
        additions: The names of the nodes that end its branches.
        most: How many of them.
    """

    additions: frozenset[str]
    most: int

    def without(self, gone: Collection[str]) -> Limit:
        """Return what is left of a limit once some branches are gone."""
        return Limit(self.additions - set(gone), self.most - len(self.additions & set(gone)))


def limits_of(chains: Sequence[Sequence[ResidualBranch]], *, most: float) -> tuple[Limit, ...]:
    """Return how many branches of each chain may go.

    Args:
        chains: The chains.
        most: Largest part of a chain.
    """
    return tuple(
        Limit(frozenset(branch.addition for branch in chain), int(len(chain) * most + 1e-9)) for chain in chains
    )


@dataclass(frozen=True, eq=False)
class Structures:
    """All structures of one model that a search may choose.

    A candidate has an index for every width, then 1 for every branch that it leaves out and 0 for the others.

    Attributes:
        model: The model.
        coupling: Its analysis.
        widths: What can become narrower.
        branches: What can be left out, in order of execution.
        limits: How many branches of a chain may go.
        measure: Tells what a cut leaves of the quantity that the target bounds.
    """

    model: Model
    coupling: Coupling
    widths: tuple[Width, ...]
    branches: tuple[ResidualBranch, ...]
    limits: tuple[Limit, ...]
    measure: Measure

    @property
    def whole(self) -> Candidate:
        """The model as it is."""
        return (0,) * (len(self.widths) + len(self.branches))

    @cached_property
    def last(self) -> Candidate:
        """The last choice of every axis; with all branches left out it may be no candidate."""
        return (*(len(width.chunks) for width in self.widths), *(1 for _ in self.branches))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What each axis is called."""
        return (*(width.name for width in self.widths), *(branch.addition for branch in self.branches))

    @cached_property
    def smallest(self) -> Candidate:
        """The narrowest widths, without the branches that cost most of those that may go."""
        found = (*self.last[: len(self.widths)], *(0 for _ in self.branches))
        places = range(len(self.widths), len(found))
        costs = {place: self.cost(with_choice(found, place, 1)) for place in places}
        for place in sorted(places, key=lambda place: (costs[place], place)):
            found = with_choice(found, place, 1) if self.allows(with_choice(found, place, 1)) else found
        return self.canonical(found)

    @cached_property
    def _readers(self) -> list[frozenset[str]]:
        return [self.coupling.readers(width.space) for width in self.widths]

    @cached_property
    def _needs_repair(self) -> bool:
        """Whether axes that several spaces share may become empty where each space keeps a class."""
        wanted = self._wanted(self.last)
        return repair(self.coupling, wanted) != wanted

    def _wanted(self, candidate: Candidate) -> dict[int, set[int]]:
        return {
            width.space: {label for chunk in width.chunks[:choice] for label in chunk}
            for width, choice in zip(self.widths, candidate, strict=False)
            if choice
        }

    def removed(self, candidate: Candidate) -> dict[int, set[int]]:
        """Return the classes that a candidate cuts, by space."""
        wanted = self._wanted(candidate)
        return repair(self.coupling, wanted) if self._needs_repair else wanted

    def left_out(self, candidate: Candidate) -> list[ResidualBranch]:
        """Return the branches that a candidate leaves out."""
        return [branch for branch, gone in zip(self.branches, candidate[len(self.widths) :], strict=True) if gone]

    def dropped(self, candidate: Candidate) -> frozenset[str]:
        """Return the names of the calls that do not run in a candidate."""
        return frozenset[str]().union(*(branch.nodes for branch in self.left_out(candidate)))

    def cost(self, candidate: Candidate) -> float:
        """Return what a candidate leaves of the quantity."""
        return self.measure(self.removed(candidate), self.dropped(candidate))

    def allows(self, candidate: Candidate) -> bool:
        """Whether every chain keeps as many branches as it must."""
        gone = {branch.addition for branch in self.left_out(candidate)}
        return all(len(limit.additions & gone) <= limit.most for limit in self.limits)

    def canonical(self, candidate: Candidate) -> Candidate:
        """Return the one form of all candidates that are the same net: what lies in a branch left out is whole."""
        left_out = self.left_out(candidate)
        if not left_out:
            return candidate
        dropped = self.dropped(candidate)
        widths = (
            0 if readers and readers <= dropped else choice
            for readers, choice in zip(self._readers, candidate, strict=False)
        )
        branches = (
            int(bool(gone) and not any(outer.holds(branch) for outer in left_out))
            for branch, gone in zip(self.branches, candidate[len(self.widths) :], strict=True)
        )
        return (*widths, *branches)

    def describe(self, candidate: Candidate) -> dict[str, Any]:
        """Return what a candidate keeps of each width, and what it leaves out; JSON-able."""
        removed = self.removed(candidate)
        widths = [
            {"name": width.name, "kept": width.size - len(removed.get(width.space, ())), "of": width.size}
            for width in self.widths
        ]
        return {"structure": widths, "left_out": [branch.addition for branch in self.left_out(candidate)]}
