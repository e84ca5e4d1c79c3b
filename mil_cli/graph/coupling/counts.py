"""What is left after a cut, counted from the masks alone: multiply-accumulates, parameters and channels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from mil_cli.graph.count import node_macs
from mil_cli.graph.coupling.coupling import Coupling, Removed
from mil_cli.graph.coupling.record import Key
from mil_cli.graph.nodes import calls

Kept = Mapping[Key, Mapping[int, int]]
"""By key and axis: how many entries are kept, where some are not."""


@dataclass(frozen=True, eq=False)
class _Axis:
    """One axis of a tensor and what removes entries of it.

    Attributes:
        key: The tensor.
        axis: The axis.
        size: Its size in the run of the analysis.
        spaces: The spaces that label it.
        entries: Where one space alone labels it: number of its entries by class.
    """

    key: Key
    axis: int
    size: int
    spaces: tuple[int, ...]
    entries: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class Counter:
    """Counts a cut of one analysed graph without making it, in about a millisecond for a small network.

    The counts equal `Model.macs` and `Model.num_params` of the model that the cut makes.
    """

    coupling: Coupling
    _known: dict[tuple[Node, tuple[Any, ...]], int] = field(default_factory=dict)

    @cached_property
    def _nodes(self) -> dict[Node, int]:
        """Nodes that count, with their multiply-accumulates before any cut."""
        nodes = {node: self._node_macs(node, {}) for node in calls(self.coupling.graph)}
        return {node: macs for node, macs in nodes.items() if macs}

    @cached_property
    def _parameters(self) -> dict[Key, tuple[int, ...]]:
        recording = self.coupling.recording
        read = {recording.key(node) for node in recording.graph.graph.nodes if node.op == "get_attr" and node.users}
        return {key: recording.shapes[key] for key in recording.leaves if recording.is_parameter(key) and key in read}

    @cached_property
    def _node_axes(self) -> list[_Axis]:
        recording = self.coupling.recording
        keys: dict[Key, None] = {}
        for node in self._nodes:
            for key in (*map(recording.key, node.all_input_nodes), recording.key(node)):
                keys[key] = None
            keys.update(dict.fromkeys(recording.outputs.get(node.name, ())))
        return self._axes(keys)

    @cached_property
    def _parameter_axes(self) -> list[_Axis]:
        return self._axes(self._parameters)

    def _axes(self, keys: Iterable[Key]) -> list[_Axis]:
        axes = []
        for key in keys:
            covering: dict[int, list[int]] = {}
            for number, space in enumerate(self.coupling.spaces):
                for axis in space.labels.get(key, ()):
                    covering.setdefault(axis, []).append(number)
            for axis, spaces in covering.items():
                labels = self.coupling.spaces[spaces[0]].labels[key][axis]
                entries = None
                if len(spaces) == 1:
                    entries = np.bincount(labels[labels >= 0], minlength=self.coupling.spaces[spaces[0]].size)
                axes.append(_Axis(key, axis, len(labels), tuple(spaces), entries))
        return axes

    def _kept(self, axes: Iterable[_Axis], removed: Removed) -> dict[Key, dict[int, int]]:
        gone = {}
        for number, classes in removed.items():
            gone[number] = np.zeros(self.coupling.spaces[number].size + 1, dtype=bool)  # the last: no class
            gone[number][list(classes)] = True
        kept: dict[Key, dict[int, int]] = {}
        for axis in axes:
            if axis.entries is not None:
                lost = int(axis.entries[gone[axis.spaces[0]][:-1]].sum()) if axis.spaces[0] in gone else 0
            else:
                marks = [
                    gone[number][self.coupling.spaces[number].labels[axis.key][axis.axis]]
                    for number in axis.spaces
                    if number in gone
                ]
                lost = int(np.logical_or.reduce(marks).sum()) if marks else 0
            if lost:
                kept.setdefault(axis.key, {})[axis.axis] = axis.size - lost
        return kept

    def _shape(self, key: Key, kept: Kept) -> tuple[int, ...] | None:
        """Return the shape, for one sample, that a tensor has after the cut."""
        shape = self.coupling.single.get(key, self.coupling.recording.shapes.get(key))
        if shape is None or key not in kept:
            return shape
        sizes, whole = list(shape), self.coupling.recording.shapes[key]
        for axis, count in kept[key].items():
            sizes[axis] = round(sizes[axis] * count / whole[axis])  # an axis may hold batch x heads
        return tuple(sizes)

    def _node_macs(self, node: Node, kept: Kept) -> int:
        recording = self.coupling.recording
        shapes = [self._shape(recording.key(used), kept) for used in node.all_input_nodes]
        output = self._shape(recording.key(node), kept)
        identity = (node, (*shapes, output))
        if identity not in self._known:
            values = {
                used: recording.values.get(used.name) if shape is None else torch.empty(shape, device="meta")
                for used, shape in zip(node.all_input_nodes, shapes, strict=True)
            }
            result = None if output is None else torch.empty(output, device="meta")
            self._known[identity] = node_macs(node, values, result)
        return self._known[identity]

    def macs_by_node(self, removed: Removed) -> dict[str, int]:
        """Return the multiply-accumulates of one sample by node name, after a cut."""
        kept = self._kept(self._node_axes, removed)
        return {node.name: self._node_macs(node, kept) for node in self._nodes}

    def macs(self, removed: Removed) -> int:
        """Return the multiply-accumulates of one sample after a cut."""
        return sum(self.macs_by_node(removed).values())

    def params(self, removed: Removed) -> int:
        """Return the number of parameters after a cut."""
        kept = self._kept(self._parameter_axes, removed)
        return sum(
            math.prod(kept.get(key, {}).get(axis, size) for axis, size in enumerate(shape))
            for key, shape in self._parameters.items()
        )

    def channels(self, removed: Removed) -> int:
        """Return the number of classes that are left after a cut, over all spaces of which anything can be cut."""
        total = sum(space.size for space in self.coupling.spaces if space.free)
        return total - sum(len(set(classes)) for classes in removed.values())


def macs_of(coupling: Coupling, removed: Removed) -> int:
    """Return the multiply-accumulates of one sample that a cut leaves, without making the cut."""
    return Counter(coupling).macs(removed)
