"""What is left after a cut, counted from the masks alone: multiply-accumulates, parameters and channels."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

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

Shape = tuple[int, ...]

Dropped = Collection[str]
"""Names of nodes of the analysed graph that no longer run, such as those of a residual block that is left out."""

_NOTHING: frozenset[str] = frozenset()


class RunningCall(NamedTuple):
    """One call that runs for every sample, and its sizes for one sample.

    Attributes:
        node: The call, a node of the analysed graph.
        inputs: The shape of each of `node.all_input_nodes`; None where that is no tensor.
        outputs: The shape of what it gives, or of each tensor that it gives.
        reads: The key of each of `node.all_input_nodes`.
        gives: The key of what it gives, or of each tensor that it gives.
    """

    node: Node
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape, ...]
    reads: tuple[Key, ...]
    gives: tuple[Key, ...]


@dataclass(frozen=True, eq=False)
class Axes:
    """Axes of tensors that lose the same number of entries in every cut.

    Attributes:
        places: The tensors, each with its axis.
        size: Their size in the run of the analysis.
        spaces: The spaces that label them.
        labels: The labels by each of these spaces.
        entries: Where one space alone labels them: number of entries by class.
    """

    places: list[tuple[Key, int]]
    size: int
    spaces: tuple[int, ...]
    labels: tuple[NDArray[np.int64], ...]
    entries: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class Counter:
    """Counts a cut of one analysed graph without making it, in about a millisecond for a small network.

    The counts equal `Model.macs` and `Model.num_params` of the model that the cut makes. Where nodes are dropped as
    well, they equal those of the model without these nodes: a residual block is left out by dropping everything in it
    up to the addition that joins it to its shortcut.
    """

    coupling: Coupling
    _known: dict[tuple[Node, tuple[Any, ...]], int] = field(default_factory=dict)

    @cached_property
    def counted(self) -> dict[Node, int]:
        """Nodes that count, with their multiply-accumulates before any cut."""
        nodes = {node: self.macs_of_node(node, {}) for node in calls(self.coupling.graph)}
        return {node: macs for node, macs in nodes.items() if macs}

    @cached_property
    def _running(self) -> list[tuple[Node, tuple[Key, ...], tuple[Key, ...]]]:
        """Calls that give tensors which depend on the model's inputs, with the keys of what they read and give.

        What depends on weights alone is computed once, when a runtime loads the model.
        """
        recording = self.coupling.recording
        changing: set[Node] = set()
        running = []
        for node in recording.graph.graph.nodes:
            if node.op == "placeholder":
                changing.add(node)
            if node.op != "call_function" or changing.isdisjoint(node.all_input_nodes):
                continue
            keys = tuple(recording.outputs.get(node.name, ())) or (recording.key(node),)
            if all(key in recording.shapes for key in keys):
                changing.add(node)
                running.append((node, tuple(map(recording.key, node.all_input_nodes)), keys))
        return running

    @cached_property
    def parameters(self) -> dict[Key, Shape]:
        """Parameters that something reads, with their shapes before any cut."""
        recording = self.coupling.recording
        read = {recording.key(node) for node in recording.graph.graph.nodes if node.op == "get_attr" and node.users}
        return {key: recording.shapes[key] for key in recording.leaves if recording.is_parameter(key) and key in read}

    @cached_property
    def _readers(self) -> dict[Key, frozenset[str]]:
        """By parameter: the calls that read it, be it through others that depend on weights alone."""
        recording = self.coupling.recording
        running = {node for node, _, _ in self._running}
        read: dict[Node, frozenset[Key]] = {}
        readers: dict[Key, set[str]] = {}
        for node in recording.graph.graph.nodes:
            if node.op == "get_attr":
                read[node] = frozenset({recording.key(node)})
                continue
            keys = _union(read.get(used, _NOTHING) for used in node.all_input_nodes)
            if node.op == "call_function" and node not in running and node.users:
                read[node] = keys
            else:
                for key in keys:
                    readers.setdefault(key, set()).add(node.name)
        return {key: frozenset(names) for key, names in readers.items()}

    @cached_property
    def node_axes(self) -> list[Axes]:
        """Axes of what the calls that count read and give, as far as a cut can shorten them."""
        recording = self.coupling.recording
        keys: dict[Key, None] = {}
        for node in self.counted:
            for key in (*map(recording.key, node.all_input_nodes), recording.key(node)):
                keys[key] = None
            keys.update(dict.fromkeys(recording.outputs.get(node.name, ())))
        return self._axes(keys)

    @cached_property
    def _running_axes(self) -> list[Axes]:
        return self._axes(dict.fromkeys(key for _, inputs, outputs in self._running for key in (*inputs, *outputs)))

    @cached_property
    def parameter_axes(self) -> list[Axes]:
        """Axes of the parameters, as far as a cut can shorten them."""
        return self._axes(self.parameters)

    def _axes(self, keys: Iterable[Key]) -> list[Axes]:
        found: dict[tuple[Any, ...], Axes] = {}
        for key in keys:
            covering: dict[int, list[int]] = {}
            for number, space in enumerate(self.coupling.spaces):
                for axis in space.labels.get(key, ()):
                    covering.setdefault(axis, []).append(number)
            for axis, spaces in covering.items():
                labels = tuple(self.coupling.spaces[number].labels[key][axis] for number in spaces)
                identity = (*spaces, *(part.tobytes() for part in labels))
                if identity not in found:
                    entries = None
                    if len(spaces) == 1:
                        entries = np.bincount(labels[0][labels[0] >= 0], minlength=self.coupling.spaces[spaces[0]].size)
                    found[identity] = Axes([], len(labels[0]), tuple(spaces), labels, entries)
                found[identity].places.append((key, axis))
        return list(found.values())

    def _kept(self, axes: Iterable[Axes], removed: Removed) -> dict[Key, dict[int, int]]:
        gone = {}
        for number, classes in removed.items():
            gone[number] = np.zeros(self.coupling.spaces[number].size + 1, dtype=bool)  # the last: no class
            gone[number][list(classes)] = True
        kept: dict[Key, dict[int, int]] = {}
        for alike in axes:
            if alike.entries is not None:
                lost = int(alike.entries[gone[alike.spaces[0]][:-1]].sum()) if alike.spaces[0] in gone else 0
            else:
                marks = [
                    gone[number][labels]
                    for number, labels in zip(alike.spaces, alike.labels, strict=True)
                    if number in gone
                ]
                lost = int(np.logical_or.reduce(marks).sum()) if marks else 0
            if lost:
                for key, axis in alike.places:
                    kept.setdefault(key, {})[axis] = alike.size - lost
        return kept

    def _shape(self, key: Key, kept: Kept) -> Shape | None:
        """Return the shape, for one sample, that a tensor has after the cut."""
        shape = self.coupling.single.get(key, self.coupling.recording.shapes.get(key))
        if shape is None or key not in kept:
            return shape
        sizes, whole = list(shape), self.coupling.recording.shapes[key]
        for axis, count in kept[key].items():
            sizes[axis] = round(sizes[axis] * count / whole[axis])  # an axis may hold batch x heads
        return tuple(sizes)

    def macs_of_node(self, node: Node, kept: Kept) -> int:
        """Return the multiply-accumulates of one call where some axes have other sizes."""
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

    def macs_by_node(self, removed: Removed, dropped: Dropped = _NOTHING) -> dict[str, int]:
        """Return the multiply-accumulates of one sample by node name, after a cut.

        Args:
            removed: By space, the classes that the cut removes.
            dropped: Nodes that no longer run.
        """
        kept = self._kept(self.node_axes, removed)
        return {node.name: self.macs_of_node(node, kept) for node in self.counted if node.name not in dropped}

    def macs(self, removed: Removed, dropped: Dropped = _NOTHING) -> int:
        """Return the multiply-accumulates of one sample after a cut.

        Args:
            removed: By space, the classes that the cut removes.
            dropped: Nodes that no longer run.
        """
        return sum(self.macs_by_node(removed, dropped).values())

    def params(self, removed: Removed, dropped: Dropped = _NOTHING) -> int:
        """Return the number of parameters after a cut.

        Args:
            removed: By space, the classes that the cut removes.
            dropped: Nodes that no longer run; parameters that only they read are gone.
        """
        return sum(self.parameters_left(removed, dropped).values())

    def parameters_left(self, removed: Removed, dropped: Dropped = _NOTHING) -> dict[Key, int]:
        """Return by parameter how many numbers of it are left after a cut; those that only dropped nodes read are gone.

        Args:
            removed: By space, the classes that the cut removes.
            dropped: Nodes that no longer run.
        """
        kept = self._kept(self.parameter_axes, removed)
        gone = frozenset(dropped)
        return {
            key: math.prod(kept.get(key, {}).get(axis, size) for axis, size in enumerate(shape))
            for key, shape in self.parameters.items()
            if not gone or not self._readers[key] <= gone
        }

    def running(self, removed: Removed, dropped: Dropped = _NOTHING) -> Iterator[RunningCall]:
        """Yield every call that runs for each sample after a cut, with its sizes for one sample, in order.

        Args:
            removed: By space, the classes that the cut removes.
            dropped: Nodes that no longer run.
        """
        kept = self._kept(self._running_axes, removed)
        shapes: dict[Key, Shape | None] = {}

        def shape(key: Key) -> Shape | None:
            if key not in shapes:
                shapes[key] = self._shape(key, kept)
            return shapes[key]

        for node, inputs, outputs in self._running:
            if node.name not in dropped:
                given = tuple(size for size in map(shape, outputs) if size is not None)
                yield RunningCall(node, tuple(map(shape, inputs)), given, inputs, outputs)

    def channels(self, removed: Removed) -> int:
        """Return the number of classes that are left after a cut, over all spaces of which anything can be cut."""
        total = sum(space.size for space in self.coupling.spaces if space.free)
        return total - sum(len(set(classes)) for classes in removed.values())


def _union(sets: Iterable[frozenset[Key]]) -> frozenset[Key]:
    return frozenset().union(*sets)


def macs_of(coupling: Coupling, removed: Removed) -> int:
    """Return the multiply-accumulates of one sample that a cut leaves, without making the cut."""
    return Counter(coupling).macs(removed)
