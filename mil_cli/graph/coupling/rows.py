"""Rows: groups of a convolution, heads, or groups of a norm, in each of which classes may be filled independently.

A class of a space that lies inside groups has an entry in every group: channel 3 of group 0, of group 1, and so on,
for the cut tensors must stay regular. Which channel of a group stands third is free, as long as everything that holds
the group's channels agrees. Here it is found where that holds: every entry gets a label of its own, labels spread
through the same relations as those of the classes, but over several axes of a tensor at once (head and position in the
head), and are united where the relations tie entries of different groups, as a rotary table does that all heads share.
What is not tied may be permuted group by group (`arrange`), after which a cut of classes removes other channels from
every group: equal counts, independent choices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mil_cli.graph.coupling.coupling import Coupling, Space
from mil_cli.graph.coupling.disjoint import NO_LABEL, DisjointSets, Labels
from mil_cli.graph.coupling.record import Key
from mil_cli.graph.coupling.table import Link, Mark, Regroup, Relation, RelationTable


@dataclass(frozen=True, eq=False)
class Rows:
    """The entries of one space's free classes, row by row.

    Attributes:
        entries: The label of each row's entry of each free class, shape ``(rows, free classes)``; within a row the
            entries may change places.
        size: Number of labels.
        places: By tensor key and axis, as in the space: the label of each index, -1 for none, with the rank of the
            tensor; other axes are of size 1 unless the label depends on them.
    """

    entries: NDArray[np.int64]
    size: int
    places: Mapping[Key, Mapping[int, Labels]]


def find_rows(coupling: Coupling) -> dict[int, Rows]:
    """Return by space the rows in which its entries can be chosen independently; spaces without any are left out."""
    found = {}
    for number, space in enumerate(coupling.spaces):
        rows = _Entries(coupling.table, space).rows() if _may_have_rows(coupling, space) else None
        if rows is not None:
            found[number] = rows
    return found


def _may_have_rows(coupling: Coupling, space: Space) -> bool:
    """Whether no vector (a bias, a norm's scale) holds a single entry of a class: it would have to serve all rows."""
    if len(space.free) < 2:
        return False
    several = False
    for member in space.members:
        counts = np.bincount(member.classes[member.classes >= 0], minlength=space.size)[list(space.free)]
        if coupling.recording.leaves[f"@{member.parameter}"].ndim == 1 and counts.min() <= 1:
            return False
        several = several or (counts.min() > 1 and member.trainable)
    return several


class _Entries:
    """Labels of single entries while they spread over the axes that a space labels."""

    def __init__(self, table: RelationTable, space: Space) -> None:
        self._table = table
        self._space = space
        self._sets = DisjointSets(0)
        self._places: dict[Key, dict[int, Labels]] = defaultdict(dict)
        self._work: dict[Key, None] = {}

    def rows(self) -> Rows | None:
        """Return the rows; None if the relations tie the entries of every class together."""
        key, axis, classes = self._origin()
        labels = np.full(len(classes), NO_LABEL)
        labels[classes >= 0] = np.arange(int((classes >= 0).sum()))
        self._sets = DisjointSets(int(labels.max()) + 1)
        self._put(key, axis, _along(labels, axis, len(self._table.shapes[key])))
        while self._work:
            key = next(iter(self._work))
            del self._work[key]
            self._mark(key)
            for other, relations in self._partners(key).items():
                for axis in list(self._places[key]):
                    self._carry(key, axis, other, relations)
            if len(np.unique(self._sets.names())) <= self._space.size:
                return None
        return self._settled()

    def _origin(self) -> tuple[Key, int, Labels]:
        """Return the weight's axis with the most entries of a class, and their classes."""
        found = [
            (int((labels >= 0).sum()), key, axis, labels)
            for key, axes in self._space.labels.items()
            if self._table.recording.is_parameter(key)
            for axis, labels in axes.items()
        ]
        _, key, axis, labels = max(found, key=lambda place: place[0])
        return key, axis, labels

    def _partners(self, key: Key) -> dict[Key, list[Relation]]:
        partners: dict[Key, list[Relation]] = defaultdict(list)
        for relation in self._table.relations.get(key, ()):
            if not isinstance(relation, Mark) and relation.a != relation.b:
                partners[relation.b if relation.a == key else relation.a].append(relation)
        return partners

    def _mark(self, key: Key) -> None:
        """Unite over the axes that some op treats as a whole: its statistics, say, mix the rows."""
        for relation in self._table.relations.get(key, ()):
            if isinstance(relation, Mark):
                for axis, labels in self._places[key].items():
                    if relation.axis != axis and labels.shape[relation.axis] > 1:
                        self._places[key][axis] = self._united_over(labels, relation.axis)

    def _carry(self, key: Key, axis: int, other: Key, relations: list[Relation]) -> None:
        """Carry the labels along one axis of a tensor to another tensor that is related to it.

        Links of one way are followed back too: that can only unite labels, and leave fewer rows.
        """
        for relation in relations:
            axes, others = _axes(relation, key)
            if axis not in axes:
                continue
            if isinstance(relation, Link):
                target: int | None = others[0]
            else:
                labelled = [place for place in others if place in self._space.labels.get(other, {})]
                target = labelled[0] if len(labelled) == 1 else None
            if target is None or target not in self._space.labels.get(other, {}):
                continue
            moved = self._moved(self._sets.roots(self._places[key][axis]), key, axis, other, relation, relations)
            self._put(other, target, moved)

    def _moved(
        self, labels: Labels, key: Key, axis: int, other: Key, main: Relation, relations: list[Relation]
    ) -> Labels:
        """Return labels as they lie on the other tensor; axes that it does not have are united over."""
        shape, steps = self._table.shapes[key], [main]
        covered = set(_axes(main, key)[0])
        for outer in range(labels.ndim):
            if labels.shape[outer] == 1 or outer in covered:
                continue
            leading = [relation for relation in relations if outer in _axes(relation, key)[0]]
            ways = {_axes(relation, key) for relation in leading}
            sources, targets = ways.pop() if len(ways) == 1 else ((), ())
            taken = {place for step in steps for place in _axes(step, key)[1]}
            if sources and covered.isdisjoint(sources) and taken.isdisjoint(targets):
                steps.append(leading[0])
                covered.update(sources)
            else:
                labels = self._united_over(labels, outer)
        moving = [source for step in steps for source in _axes(step, key)[0]]
        rest = [place for place in range(labels.ndim) if place not in moving]
        block = labels.transpose([*moving, *rest]).reshape([labels.shape[source] for source in moving])
        targets_in_order: list[int] = []
        position = 0
        for step in steps:
            own, others = _axes(step, key)
            block = self._step(block, position, step, key, [shape[source] for source in own], other)
            targets_in_order.extend(others)
            position += len(others)
        rank = len(self._table.shapes[other])
        missing = [place for place in range(rank) if place not in targets_in_order]
        full = block.reshape([*block.shape, *[1] * len(missing)])
        return np.ascontiguousarray(full.transpose(np.argsort([*targets_in_order, *missing])))

    def _step(self, block: Labels, position: int, relation: Relation, key: Key, sizes: list[int], other: Key) -> Labels:
        """Take some axes of a block through one relation, in place of them the other tensor's axes."""
        if isinstance(relation, Link):
            size = self._table.shapes[other][_axes(relation, key)[1][0]]
            source, target = (relation.a_index, relation.b_index)
            if relation.a != key:
                source, target = target, source
            if source is None or target is None or block.shape[position] == 1:
                return block
            return self._indexed(block, position, source, target, size)
        others = _axes(relation, key)[1]
        before, after = block.shape[:position], block.shape[position + len(sizes) :]
        spread = np.broadcast_to(block, (*before, *sizes, *after))
        spread = spread.reshape((*before, *(self._table.shapes[other][place] for place in others), *after))
        for place in range(position, position + len(others)):
            first = np.take(spread, [0], place)
            if bool((spread == first).all()):
                spread = first
        return spread

    def _indexed(self, block: Labels, position: int, source: Labels, target: Labels, size: int) -> Labels:
        taken = np.take(block, source, position)
        shape = list(block.shape)
        shape[position] = size
        result = np.full(shape, NO_LABEL)
        into = np.moveaxis(result, position, 0)
        from_ = np.moveaxis(taken, position, 0)
        into[target] = from_
        differing = into[target] != from_  # several entries that correspond to one
        if differing.any():
            self._unite(into[target][differing], from_[differing])
        return self._sets.roots(result)

    def _united_over(self, labels: Labels, axis: int) -> Labels:
        first = np.take(labels, [0], axis)
        whole = np.broadcast_to(first, labels.shape)
        self._unite(whole.reshape(-1), labels.reshape(-1))
        return self._sets.roots(first)

    def _unite(self, first: Labels, second: Labels) -> None:
        chosen = (first >= 0) & (second >= 0) & (first != second)
        if chosen.any():
            self._sets.unite(first[chosen], second[chosen])

    def _put(self, key: Key, axis: int, labels: Labels) -> None:
        present = self._places[key].get(axis)
        if present is None:
            self._places[key][axis] = labels
            self._work[key] = None
            return
        for outer in range(labels.ndim):  # what does not depend on an axis here cannot depend on it there
            if outer != axis and labels.shape[outer] != present.shape[outer]:
                if labels.shape[outer] == 1:
                    present = self._united_over(present, outer)
                else:
                    labels = self._united_over(labels, outer)
        before = self._sets.roots(present)
        self._unite(before.reshape(-1), self._sets.roots(labels).reshape(-1))
        merged = np.where(before >= 0, before, labels)
        if merged.shape != self._places[key][axis].shape or bool(((merged >= 0) & (before < 0)).any()):
            self._work[key] = None
        self._places[key][axis] = merged

    def _settled(self) -> Rows | None:
        """Name the labels 0, 1, ... and sort the entries of every class into rows."""
        names, renamed = np.unique(self._sets.names(), return_inverse=True)
        places: dict[Key, dict[int, Labels]] = {}
        of_class = np.full(len(names), NO_LABEL)
        for key, axes in self._space.labels.items():
            for axis, classes in axes.items():
                labels = self._places[key].get(axis)
                if labels is None:
                    return None
                labels = np.where(labels >= 0, renamed[np.maximum(labels, 0)], NO_LABEL)
                spread = np.broadcast_to(_along(classes, axis, labels.ndim), labels.shape)
                if bool(((labels >= 0) != (spread >= 0)).any()):
                    return None
                of_class[labels[labels >= 0]] = spread[labels >= 0]
                places.setdefault(key, {})[axis] = labels
        entries = _rows_of(self._space, of_class, _signatures(places, len(names)))
        return None if entries is None else Rows(entries, len(names), places)


def _axes(relation: Relation, key: Key) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the axes that a relation has on a tensor, and those on the other."""
    if isinstance(relation, Regroup):
        both = relation.a_axes, relation.b_axes
    else:
        assert isinstance(relation, Link)
        both = (relation.a_axis,), (relation.b_axis,)
    return both if relation.a == key else (both[1], both[0])


def _along(labels: Labels, axis: int, rank: int) -> Labels:
    """Return a vector as it lies along one axis of a tensor."""
    return labels.reshape([-1 if place == axis else 1 for place in range(rank)])


def lines_of(labels: Labels, axis: int) -> Labels:
    """Return labels of a tensor as ``(all other axes, axis)``."""
    return np.moveaxis(labels, axis, -1).reshape(-1, labels.shape[axis])


def _signatures(places: Mapping[Key, Mapping[int, Labels]], size: int) -> NDArray[np.int64]:
    """Return for each label how often it stands in each line of each tensor; labels that may change places are equal.

    Lines in which all labels stand equally often tell nothing apart and are left out.
    """
    counted: dict[bytes, NDArray[np.int64]] = {}
    for axes in places.values():
        for axis, labels in axes.items():
            for line in np.unique(lines_of(labels, axis), axis=0):
                counts = np.bincount(line[line >= 0], minlength=size)
                counted.setdefault(counts.tobytes(), counts)
    kept = [counts for counts in counted.values() if counts.min() != counts.max()]
    return np.stack(kept, axis=1) if kept else np.zeros((size, 1), dtype=np.int64)


def _rows_of(space: Space, of_class: Labels, signatures: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return the entries by row and free class; None unless every free class has one of each row."""
    _, kinds = np.unique(signatures, axis=0, return_inverse=True)
    by_class = []
    for label in space.free:
        entries = np.flatnonzero(of_class == label)
        by_class.append(entries[np.argsort(kinds[entries], kind="stable")])
    if len({tuple(kinds[entries]) for entries in by_class}) != 1 or len(by_class[0]) < 2:
        return None
    return np.stack(by_class, axis=1)


def entry_spaces(coupling: Coupling, rows: Mapping[int, Rows]) -> Iterator[Space]:
    """Yield for each space with rows one whose classes are its single entries, as far as whole axes hold them."""
    for number, found in rows.items():
        space = coupling.spaces[number]
        labels = {
            key: {axis: labels.reshape(-1) for axis, labels in axes.items() if labels.size == labels.shape[axis]}
            for key, axes in found.places.items()
        }
        yield space.relabelled(found.size, labels)
