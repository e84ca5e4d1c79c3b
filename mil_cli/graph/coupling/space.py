"""Propagating labels from one axis through all relations: what must be cut together gets the same label.

A space begins with labels on one axis. Links carry them on, views divide or join them, and where two labels meet on
one entry they are united (union-find). What comes out is, for every axis reached, a vector of labels: entries of the
same label in any axis of any tensor are cut together, or not at all. Freezing and inexactness are kept per label.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from mil_cli.graph.coupling.disjoint import NO_LABEL, DisjointSets, Labels
from mil_cli.graph.coupling.record import Key
from mil_cli.graph.coupling.table import Effect, Link, Mark, Regroup, RelationTable


@dataclass(frozen=True, eq=False)
class Reason:
    """Why entries cannot be cut, or only inexactly: the node and what it does."""

    node: Node
    text: str


@dataclass(frozen=True, eq=False)
class Seed:
    """Labels on one axis from which a space begins."""

    key: Key
    axis: int
    labels: Labels


class SplitByView(Exception):
    """A view spreads the labels over several axes; each alternative is a seed that it would keep on one."""

    def __init__(self, alternatives: list[Seed]) -> None:
        super().__init__("a view spreads the labels over several axes")
        self.alternatives = alternatives


class Propagation:
    """One space while its labels spread.

    Args:
        table: The relations of the graph.
        freeze_on_split: Freeze labels that a view spreads over several axes, rather than raise `SplitByView`.
    """

    def __init__(self, table: RelationTable, *, freeze_on_split: bool = False) -> None:
        self._table = table
        self._freeze_on_split = freeze_on_split
        self._sets = DisjointSets(0)
        self._work: dict[Key, None] = {}
        self.labels: dict[Key, dict[int, Labels]] = defaultdict(dict)
        self.frozen: dict[int, Reason] = {}
        self.inexact: dict[int, dict[Node, Reason]] = defaultdict(dict)

    def run(self, seed: Seed) -> None:
        """Spread the labels of `seed` until nothing changes, then give each label its final name.

        Raises:
            SplitByView: A view spreads labels over several axes.
        """
        self._sets = DisjointSets(int(seed.labels.max()) + 1)
        self._put(seed.key, seed.axis, seed.labels.astype(np.int64))
        while self._work:
            key = next(iter(self._work))  # in the order of arrival, so that the result depends on nothing else
            del self._work[key]
            for relation in self._table.relations.get(key, ()):
                if isinstance(relation, Link):
                    self._follow(relation, key)
                elif isinstance(relation, Regroup):
                    if key == relation.a:
                        self._through(relation.a, relation.a_axes, relation.b, relation.b_axes)
                    if key == relation.b:
                        self._through(relation.b, relation.b_axes, relation.a, relation.a_axes)
                else:
                    self._mark(relation)
        self._settle()

    def _put(self, key: Key, axis: int, labels: Labels) -> None:
        present = self.labels[key].get(axis)
        if present is labels or not (labels >= 0).any():
            return
        if present is None:
            self.labels[key][axis] = labels  # shared by all axes that have the same labels, so never changed in place
            self._work[key] = None
            return
        meeting = (present >= 0) & (labels >= 0) & (present != labels)
        if meeting.any():
            first, second = self._sets.roots(present[meeting]), self._sets.roots(labels[meeting])
            differing = first != second
            if differing.any():
                self._sets.unite(first[differing], second[differing])
        added = (present < 0) & (labels >= 0)
        if added.any():
            self.labels[key][axis] = np.where(added, labels, present)
            self._work[key] = None

    def _follow(self, link: Link, key: Key) -> None:
        for source, source_axis, source_index, target, target_axis, target_index in (
            (link.a, link.a_axis, link.a_index, link.b, link.b_axis, link.b_index),
            (link.b, link.b_axis, link.b_index, link.a, link.a_axis, link.a_index),
        ):
            labels = self.labels[source].get(source_axis) if source == key else None
            if labels is None or (link.one_way and source != link.a):
                continue
            if source_index is None or target_index is None:
                self._put(target, target_axis, labels)
                continue
            carried = self._sets.roots(labels[source_index])
            arrived = np.full(self._table.shapes[target][target_axis], NO_LABEL)
            labelled = carried >= 0
            where, what = target_index[labelled], carried[labelled]
            arrived[where] = what
            several = arrived[where] != what  # many entries that correspond to one
            if several.any():
                self._sets.unite(arrived[where][several], what[several])
            self._put(target, target_axis, arrived)

    def _mark(self, mark: Mark) -> None:
        labels = self.labels[mark.key].get(mark.axis)
        if labels is None:
            return
        chosen = labels if mark.index is None else labels[mark.index]
        if mark.effect is Effect.FREEZE:
            self._freeze(chosen, Reason(mark.node, mark.reason))
        else:
            for label in np.unique(self._sets.roots(chosen)).tolist():
                if label >= 0:
                    self.inexact[label].setdefault(mark.node, Reason(mark.node, mark.reason))

    def _freeze(self, labels: Labels, reason: Reason) -> None:
        for label in np.unique(self._sets.roots(labels)).tolist():
            if label >= 0:
                self.frozen.setdefault(label, reason)

    def _through(self, a: Key, a_axes: tuple[int, ...], b: Key, b_axes: tuple[int, ...]) -> None:
        """Carry labels from axes of `a` to the same positions, divided into axes of `b`."""
        a_sizes = [self._table.shapes[a][axis] for axis in a_axes]
        b_sizes = [self._table.shapes[b][axis] for axis in b_axes]
        for number, axis in enumerate(a_axes):
            labels = self.labels[a].get(axis)
            if labels is None:
                continue
            labels = self._sets.roots(labels)
            wide = [position for position, size in enumerate(b_sizes) if size != 1]
            if len(wide) == 1 and sum(size != 1 for size in a_sizes) <= 1:
                if len(labels) == b_sizes[wide[0]]:
                    self._put(b, b_axes[wide[0]], labels)
                continue
            spread_shape = [1] * len(a_sizes)
            spread_shape[number] = a_sizes[number]
            spread = np.broadcast_to(labels.reshape(spread_shape), a_sizes).reshape(b_sizes)
            varying = [
                position
                for position, size in enumerate(b_sizes)
                if size > 1 and bool((spread != np.take(spread, [0], position)).any())
            ]
            if not varying:
                self._freeze(labels, Reason(self._node_of(b, a), "a view makes one class of the whole axis"))
            elif len(varying) == 1:
                first = np.moveaxis(spread, varying[0], 0).reshape(b_sizes[varying[0]], -1)[:, 0]
                self._put(b, b_axes[varying[0]], np.ascontiguousarray(first))
            elif self._freeze_on_split:
                self._freeze(labels, Reason(self._node_of(b, a), "a view divides the axis"))
            else:
                seeds = (_coarsest(spread, position) for position in varying)
                raise SplitByView(
                    [
                        Seed(b, b_axes[position], labels)
                        for position, labels in zip(varying, seeds, strict=True)
                        if len(np.unique(labels)) > 1
                    ]
                )

    def _node_of(self, *keys: Key) -> Node:
        names = {key.split("#")[0].split("~")[0] for key in keys}
        nodes: list[Node] = list(self._table.recording.graph.graph.nodes)
        return next((node for node in nodes if node.name in names and node.op != "get_attr"), nodes[0])

    def _settle(self) -> None:
        """Name the labels 0, 1, ... in order, everywhere."""
        distinct = {id(labels): labels for axes in self.labels.values() for labels in axes.values()}
        roots = {identity: self._sets.roots(labels) for identity, labels in distinct.items()}
        used = np.unique(np.concatenate(list(roots.values())))
        used = used[used >= 0]
        names = self._sets.names()
        renamed = np.full(len(names) + 1, NO_LABEL)  # the last entry stands for no label
        renamed[used] = np.arange(len(used))
        # Most tensors of a space have the same labels on the same axes; apart they would take most of the memory.
        contents: dict[bytes, Labels] = {}
        settled = {}
        for identity, labels in roots.items():
            named = renamed[labels]
            settled[identity] = contents.setdefault(named.tobytes(), named)
        alike: dict[tuple[tuple[int, int], ...], dict[int, Labels]] = {}
        shared = {}
        for key, axes in self.labels.items():
            if axes:
                named_axes = {axis: settled[id(labels)] for axis, labels in axes.items()}
                signature = tuple((axis, id(labels)) for axis, labels in named_axes.items())
                shared[key] = alike.setdefault(signature, named_axes)
        self.labels = shared
        frozen: dict[int, Reason] = {}
        for label, reason in self.frozen.items():
            frozen.setdefault(int(renamed[names[label]]), reason)
        self.frozen = frozen
        inexact: dict[int, dict[Node, Reason]] = defaultdict(dict)
        for label, reasons in self.inexact.items():
            inexact[int(renamed[names[label]])].update(reasons)
        self.inexact = inexact
        self._sets = DisjointSets(0)  # of the labels that were; spaces are kept, and this would double them


def _coarsest(spread: Labels, position: int) -> Labels:
    """Return the finest labels of one axis under which every slice along it is of one class."""
    slices = np.moveaxis(spread, position, 0).reshape(spread.shape[position], -1)
    if (slices < 0).any():
        return np.arange(len(slices))  # partly without labels: whole slices
    parents: dict[int, int] = {}

    def root(label: int) -> int:
        while parents.setdefault(label, label) != label:
            label = parents[label]
        return label

    for row in slices:
        first, *others = np.unique(row).tolist()
        for other in others:
            a, b = root(first), root(other)
            if a != b:
                parents[b] = a
    classes = np.array([root(int(row[0])) for row in slices])
    return np.unique(classes, return_inverse=True)[1].astype(np.int64)
