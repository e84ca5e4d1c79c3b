"""One node of a graph that is being cut: the node as it was, its copy, and what the masks leave of its tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from mil_cli.graph.coupling.operators import Graphed, add_buffer, argument, has_argument, operator_name
from mil_cli.graph.coupling.record import Key, Recording
from mil_cli.graph.coupling.selection import Mask, Masks
from mil_cli.graph.nodes import set_argument


@dataclass
class Edit:
    """What a rewrite needs to know about one node.

    Attributes:
        old: The node in the graph that was analysed.
        new: Its copy, to be changed.
        module: The module of the copy.
        recording: Shapes and values before the cut.
        masks: What each axis keeps.
        shapes: Shapes before the cut, by key.
        values: Integers of the graph after the cut, by the old node's name.
    """

    old: Node
    new: Node
    module: Graphed
    recording: Recording
    masks: Masks
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The op's name."""
        return operator_name(self.old)

    @property
    def output(self) -> Key:
        """The key of the node's tensor."""
        return self.recording.key(self.old)

    def key(self, name: str) -> Key:
        """Return the key of a tensor argument."""
        value = argument(self.old, name)
        return self.recording.key(value) if isinstance(value, Node) else ""

    def shape(self, key: Key) -> tuple[int, ...]:
        """Return a tensor's shape before the cut."""
        return self.recording.shapes[key]

    def axis(self, key: Key, axis: int) -> int:
        """Return an axis as a number from 0."""
        return axis % len(self.recording.shapes[key])

    def mask(self, key: Key, axis: int) -> Mask | None:
        """Return what an axis keeps; None if it keeps everything."""
        return self.masks.get(key, {}).get(axis)

    def touched(self, key: Key) -> bool:
        """Return whether a tensor loses anything."""
        return bool(self.masks.get(key))

    def kept(self, key: Key, axis: int) -> int:
        """Return the size of an axis after the cut."""
        mask = self.mask(key, axis)
        return self.recording.shapes[key][axis] if mask is None else int(mask.sum())

    def argument(self, name: str, default: Any = None) -> Any:
        """Return an argument of the old node."""
        return argument(self.old, name, default)

    def value(self, name: str, default: Any = None) -> Any:
        """Return an argument of the old node, with the integers that the graph computed filled in."""
        return self.recording.value(argument(self.old, name, default))

    def set(self, name: str, value: Any) -> None:
        """Set an argument of the new node."""
        set_argument(self.new, name, value)

    def has(self, name: str) -> bool:
        """Return whether the op has an argument of that name."""
        return has_argument(self.old, name)

    def replace_target(self, target: Any, *args: Any) -> None:
        """Make the new node call something else."""
        self.new.target = target
        self.new.args = args
        self.new.kwargs = {}

    def constant(self, index: np.ndarray[Any, Any]) -> Node:
        """Add an index vector to the module, read just before the new node."""
        with self.module.graph.inserting_before(self.new):
            return add_buffer(self.module, self.module.graph, "_index", torch.from_numpy(index.astype(np.int64)))

    def resized(self, old: Any, new: Any, size: int) -> Any:
        """Return what stands for a size argument after the cut.

        Args:
            old: The argument in the old graph: an int, or a node that computes one.
            new: The same in the new graph.
            size: What it must be for the shapes of the run.
        """
        if not isinstance(old, Node):
            return old if old == -1 else size
        current = self.values.get(old.name, self.recording.values.get(old.name))
        if current == size:
            return new
        divisor = math.gcd(size, current)
        graph = self.module.graph
        with graph.inserting_before(self.new):
            result = new
            if size // divisor != 1:
                result = graph.call_function(operator.mul, (result, size // divisor))
            if current // divisor != 1:
                result = graph.call_function(operator.floordiv, (result, current // divisor))
        return result


Rewrite = Callable[[Edit], None]
