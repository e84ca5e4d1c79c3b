"""The result of the analysis: spaces of classes that are cut together, and what cannot be cut and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch.fx import GraphModule

from mil_cli.graph.coupling.disjoint import Labels
from mil_cli.graph.coupling.record import Key, Recording
from mil_cli.graph.coupling.table import RelationTable

Removed = Mapping[int, Iterable[int]]
"""By space: the classes to remove."""


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of a weight, buffer or constant that belongs to a space.

    Attributes:
        parameter: The first name under which the graph reads it.
        names: All names, more than one for shared weights.
        axis: The axis.
        classes: For each index of the axis its class; -1 where it belongs to no class of this space.
        trainable: Whether it is a parameter, not a buffer or constant.
    """

    parameter: str
    names: tuple[str, ...]
    axis: int
    classes: Labels
    trainable: bool


@dataclass(frozen=True)
class Frozen:
    """Entries of one axis of a parameter that cannot be cut, and why.

    Attributes:
        parameter: Name of the parameter.
        axis: Its axis.
        entries: How many of the axis's indices.
        size: How many it has.
        node: Name of the node that forbids it.
        operator: What the node calls.
        reason: What about it forbids a cut.
        source_line: ``file:line`` of the user's code that made the node; empty if unknown.
    """

    parameter: str
    axis: int
    entries: int
    size: int
    node: str
    operator: str
    reason: str
    source_line: str


@dataclass(frozen=True, eq=False)
class Space:
    """Classes of entries, all independent of each other; the entries of one class are cut together everywhere.

    Attributes:
        origin: The weight from which the space was found.
        size: Number of classes; they are 0 ... size - 1.
        labels: By tensor key and axis: the class of each index, -1 for none.
        members: The part of `labels` that lies on weights, buffers and constants.
        frozen: Classes that cannot be cut, with the reason.
        inexact: Classes over which some op takes statistics, with that op's node names: cutting them is no longer the
            same as setting them to zero.
    """

    origin: str
    size: int
    labels: Mapping[Key, Mapping[int, Labels]]
    members: tuple[Member, ...]
    frozen: Mapping[int, str]
    inexact: Mapping[int, frozenset[str]]

    @cached_property
    def free(self) -> tuple[int, ...]:
        """The classes that can be cut."""
        return tuple(number for number in range(self.size) if number not in self.frozen)

    @cached_property
    def exact(self) -> tuple[int, ...]:
        """The classes that can be cut and over which nothing takes statistics."""
        return tuple(number for number in self.free if not self.inexact.get(number))

    @cached_property
    def entries_per_class(self) -> int:
        """Entries of a class on the narrowest axis that the space wholly covers: 64 for heads of size 64."""
        widths = [
            len(member.classes) // self.size
            for member in self.members
            if (member.classes >= 0).all() and len(member.classes) % self.size == 0
        ]
        return min(widths, default=1)

    def relabelled(self, size: int, labels: Mapping[Key, Mapping[int, Labels]]) -> Space:
        """Return a space over the same weights with other classes, all of them free.

        Args:
            size: Number of classes.
            labels: By tensor key and axis: the new class of each index; axes that are absent are left out.
        """
        members = tuple(
            replace(member, classes=labels[f"@{member.parameter}"][member.axis])
            for member in self.members
            if member.axis in labels.get(f"@{member.parameter}", {})
        )
        return Space(origin=self.origin, size=size, labels=labels, members=members, frozen={}, inexact={})


@dataclass(frozen=True, eq=False)
class Coupling:
    """Everything that the analysis of one graph found.

    Attributes:
        table: The relations between the axes of the normalised copy of the graph.
        spaces: The spaces; an axis may belong to several (heads and head size), and is cut by all of them.
        frozen: What cannot be cut and why, one entry per parameter axis and reason.
        unknown: (node name, reason, source line) of ops without a rule.
        single: Shapes for a batch of one where it could be run, else those of `recording`.
    """

    table: RelationTable
    spaces: tuple[Space, ...]
    frozen: tuple[Frozen, ...]
    unknown: tuple[tuple[str, str, str], ...]
    single: Mapping[Key, tuple[int, ...]]

    @property
    def recording(self) -> Recording:
        """The normalised copy of the graph, with the shapes and values of the run."""
        return self.table.recording

    @property
    def graph(self) -> GraphModule:
        """The normalised graph that cuts are made from."""
        return self.recording.graph

    @cached_property
    def cuttable_share(self) -> float:
        """Share of the rows (axis 0) of all weights with two axes or more that can be cut."""
        total = covered = 0
        for key, leaf in self.recording.leaves.items():
            if not isinstance(leaf, torch.nn.Parameter) or leaf.ndim < 2:
                continue
            total += leaf.shape[0]
            free = np.zeros(leaf.shape[0], dtype=bool)
            for space in self.spaces:
                labels = space.labels.get(key, {}).get(0)
                if labels is not None:
                    free |= np.isin(labels, space.free)
            covered += int(free.sum())
        return covered / total if total else 0.0

    def readers(self, number: int) -> frozenset[str]:
        """Return the names of the calls that read a parameter which a space labels."""
        recording, labels = self.recording, self.spaces[number].labels
        return frozenset(
            user.name
            for node in recording.graph.graph.find_nodes(op="get_attr")
            if recording.key(node) in labels and recording.is_parameter(recording.key(node))
            for user in node.users
        )

    def freeze(self, spaces: Sequence[int], reason: str) -> Coupling:
        """Return this coupling with every class of some spaces frozen, as after a failed check.

        Args:
            spaces: Indices of spaces.
            reason: Why; it is listed under `frozen`.
        """
        return self.freeze_classes({number: range(self.spaces[number].size) for number in spaces}, reason)

    def freeze_classes(self, classes: Removed, reason: str) -> Coupling:
        """Return this coupling with some classes frozen.

        Args:
            classes: By space: the classes.
            reason: Why; it is listed under `frozen`.
        """
        changed = list(self.spaces)
        listed = list(self.frozen)
        for number, found in classes.items():
            space, chosen = changed[number], sorted(found)
            if not chosen:
                continue
            frozen = {**dict.fromkeys(chosen, reason), **space.frozen}
            changed[number] = replace(space, frozen=frozen)
            listed.extend(
                Frozen(
                    parameter=member.parameter,
                    axis=member.axis,
                    entries=int(np.isin(member.classes, chosen).sum()),
                    size=len(member.classes),
                    node="",
                    operator="",
                    reason=reason,
                    source_line="",
                )
                for member in space.members
                if member.trainable
            )
        return replace(self, spaces=tuple(changed), frozen=tuple(listed))
