"""The three kinds of relation between axes of tensors, and the builder that each op family fills them in with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from mil_cli.graph.coupling.operators import argument, has_argument, operator_name
from mil_cli.graph.coupling.record import Key, Recording

Indices = NDArray[np.int64]


class Effect(Enum):
    """What an op does to an axis beyond passing it on.

    FREEZE: the axis cannot be cut. INEXACT: it can, but the op's statistics over the axis change with it.
    """

    FREEZE = "freeze"
    INEXACT = "inexact"


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """Entry ``a_index[i]`` of an axis of `a` stands or falls with entry ``b_index[i]`` of an axis of `b`.

    Both indices None: the axes correspond entry by entry. Several entries may correspond to one.
    One way: labels pass from `a` to `b` only, for what passes back follows from other relations.
    """

    a: Key
    a_axis: int
    b: Key
    b_axis: int
    a_index: Indices | None = None
    b_index: Indices | None = None
    one_way: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Regroup:
    """Axes of `a` and axes of `b` are the same row-major positions, differently divided."""

    a: Key
    a_axes: tuple[int, ...]
    b: Key
    b_axes: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """An effect on an axis, or on the entries `index` of it, with the node and the reason."""

    key: Key
    axis: int
    effect: Effect
    node: Node
    reason: str
    index: Indices | None = None


Relation = Link | Regroup | Mark


class UnsupportedForm(Exception):
    """An op is known, but not in this form; all axes that it touches are frozen."""


@dataclass
class RelationTable:
    """All relations of one graph, by each key that they touch.

    Attributes:
        recording: Shapes and values of the run.
        shapes: Shapes by key, those of virtual tensors included.
        relations: By key.
        unknown: Nodes whose op has no rule, or not in that form, with the reason.
    """

    recording: Recording
    shapes: dict[Key, tuple[int, ...]]
    relations: dict[Key, list[Relation]] = field(default_factory=lambda: defaultdict(list))
    unknown: list[tuple[Node, str]] = field(default_factory=list)

    def add(self, relation: Relation) -> None:
        """Attach a relation to the keys that it touches."""
        if isinstance(relation, Mark):
            self.relations[relation.key].append(relation)
            return
        self.relations[relation.a].append(relation)
        if relation.b != relation.a:
            self.relations[relation.b].append(relation)


class Operation:
    """One node as a rule sees it: arguments by name, keys and shapes of its tensors, and how to relate them.

    Args:
        node: A node that returns tensors.
        table: Where relations go.
    """

    def __init__(self, node: Node, table: RelationTable) -> None:
        self.node = node
        self.name = operator_name(node)
        self._table = table
        self._recording = table.recording
        self.inputs: list[Key] = []
        for used in node.all_input_nodes:
            key = self._recording.key(used)
            if key in table.shapes and key not in self.inputs:
                self.inputs.append(key)
        self.outputs: list[Key] = (
            [self._recording.key(node)]
            if self._recording.key(node) in table.shapes
            else list(self._recording.outputs.get(node.name, []))
        )

    @property
    def output(self) -> Key:
        """The key of the only tensor returned.

        Raises:
            UnsupportedForm: The node returns several tensors.
        """
        if len(self.outputs) != 1:
            raise UnsupportedForm("returns several tensors")
        return self.outputs[0]

    @property
    def input(self) -> Key:
        """The key of the first tensor that goes in."""
        return self.inputs[0]

    def argument(self, name: str, default: Any = None) -> Any:
        """Return an argument by its schema name, nodes left as they are."""
        return argument(self.node, name, default)

    def value(self, name: str, default: Any = None) -> Any:
        """Return an argument by its schema name, with integers that the graph computes filled in.

        Raises:
            UnsupportedForm: It depends on a value that the run did not record.
        """
        try:
            return self._recording.value(argument(self.node, name, default))
        except KeyError as error:
            raise UnsupportedForm(f"'{name}' is not known before the run") from error

    def dtype(self, key: Key) -> torch.dtype | None:
        """Return the type of a tensor; None for a virtual one."""
        return self._recording.dtypes.get(key)

    def has(self, name: str) -> bool:
        """Return whether the overload has an argument of that name."""
        return has_argument(self.node, name)

    def key(self, name: str) -> Key | None:
        """Return the key of a tensor argument; None if it is not given."""
        value = argument(self.node, name)
        return self.key_of(value) if isinstance(value, Node) else None

    def need(self, name: str) -> Key:
        """Return the key of a tensor argument.

        Raises:
            UnsupportedForm: It is not given.
        """
        key = self.key(name)
        if key is None:
            raise UnsupportedForm(f"no '{name}'")
        return key

    def keys(self, name: str) -> list[Key]:
        """Return the keys of an argument that is a list of tensors."""
        return [self.key_of(element) for element in argument(self.node, name) or [] if isinstance(element, Node)]

    def key_of(self, node: Node) -> Key:
        """Return the key of another node's tensor."""
        return self._recording.key(node)

    def shape(self, key: Key) -> tuple[int, ...]:
        """Return the shape of a tensor in the run."""
        return self._table.shapes[key]

    def rank(self, key: Key) -> int:
        """Return the number of axes of a tensor."""
        return len(self._table.shapes[key])

    def axis(self, key: Key, axis: int) -> int:
        """Return an axis as a number from 0."""
        rank = self.rank(key)
        if not -rank <= axis < rank:
            raise UnsupportedForm(f"axis {axis} of {rank}")
        return axis % rank

    def virtual(self, tag: str, shape: tuple[int, ...]) -> Key:
        """Invent a tensor that the graph does not have, to relate others through it."""
        key = f"{self.node.name}~{tag}"
        self._table.shapes[key] = shape
        return key

    def link(
        self,
        a: Key,
        a_axis: int,
        b: Key,
        b_axis: int,
        a_index: Indices | None = None,
        b_index: Indices | None = None,
        *,
        one_way: bool = False,
    ) -> None:
        """Relate two axes, entry by entry or by indices; axes of size 1 against 1 carry nothing."""
        a_axis, b_axis = self.axis(a, a_axis), self.axis(b, b_axis)
        if a_index is None or b_index is None:
            sizes = self.shape(a)[a_axis], self.shape(b)[b_axis]
            if sizes[0] != sizes[1]:
                raise UnsupportedForm(f"axes of size {sizes[0]} and {sizes[1]} do not correspond")
            if sizes[0] == 1:
                return
        self._table.add(Link(a, a_axis, b, b_axis, a_index, b_index, one_way))

    def link_all(self, a: Key, b: Key, *, but: Iterable[int] = ()) -> None:
        """Relate all axes of two tensors of the same rank, except some."""
        skipped = set(but)
        for axis in range(self.rank(a)):
            if axis not in skipped:
                self.link(a, axis, b, axis)

    def link_broadcast(self, a: Key, b: Key, *, last: int | None = None) -> None:
        """Relate the axes of `a` to those of `b` aligned at the right, where the sizes agree."""
        offset = self.rank(b) - self.rank(a)
        if offset < 0:
            raise UnsupportedForm("the result has fewer axes than an operand")
        for axis in range(self.rank(a) if last is None else last):
            if self.shape(a)[axis] == self.shape(b)[axis + offset]:
                self.link(a, axis, b, axis + offset)

    def regroup(self, a: Key, a_axes: Sequence[int], b: Key, b_axes: Sequence[int]) -> None:
        """Say that some axes of `a` hold the same row-major positions as some axes of `b`."""
        self._table.add(Regroup(a, tuple(a_axes), b, tuple(b_axes)))

    def freeze(self, key: Key, axes: Iterable[int] | int, reason: str, index: Indices | None = None) -> None:
        """Say that axes, or some entries of one, cannot be cut."""
        self._mark(key, axes, Effect.FREEZE, reason, index)

    def freeze_all(self, keys: Iterable[Key], reason: str) -> None:
        """Say that no axis of these tensors can be cut."""
        for key in keys:
            self._mark(key, range(self.rank(key)), Effect.FREEZE, reason, None)

    def inexact(self, key: Key, axes: Iterable[int] | int, reason: str) -> None:
        """Say that the op takes statistics over these axes."""
        self._mark(key, axes, Effect.INEXACT, reason, None)

    def _mark(self, key: Key, axes: Iterable[int] | int, effect: Effect, reason: str, index: Indices | None) -> None:
        for axis in [axes] if isinstance(axes, int) else axes:
            self._table.add(Mark(key, self.axis(key, axis), effect, self.node, reason, index))


Rule = Callable[[Operation], None]
Rules = Mapping[str, Rule]


def rules_for(rule: Rule, *names: str) -> dict[str, Rule]:
    """Return a table that gives `rule` to each op name."""
    return dict.fromkeys(names, rule)
