"""An estimate of the memory that a runtime needs for a cut, from the sizes alone: weights, and what is live at once."""

from __future__ import annotations

import math
import sys
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch.fx import Node

from mil_cli.graph.coupling.counts import Counter, Dropped, RunningCall
from mil_cli.graph.coupling.coupling import Removed
from mil_cli.graph.coupling.operators import operator_name
from mil_cli.graph.coupling.record import Key
from mil_cli.graph.coupling.relations.norm import BATCH_NORMS
from mil_cli.graph.coupling.relations.pointwise import is_pointwise
from mil_cli.graph.nodes import get_argument

_SAME_PLACE = frozenset(
    {
        *("view", "reshape", "_unsafe_view", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("alias", "detach", "clone", "contiguous", "lift_fresh_copy", "dropout", "feature_dropout"),
    }
)
"""Operators whose result a runtime lets lie where the operand lies, or that it does not run at all."""

_ATTENTION = "scaled_dot_product_attention"
_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class MemoryEstimate:
    """Estimates the bytes that a runtime needs for one sample, for any cut of one analysed graph, without making it.

    They are those of the weights, of the constants beside them, and of the largest set of activations that are live at
    once as the calls run in their order: from the call that makes one to the last that reads it. Inputs and outputs are
    the caller's, and stay. A view lies where its operand lies, and an operator that acts entry by entry (or a batch
    norm, which is folded) writes over an operand that nobody reads any more, as onnxruntime plans its buffers.
    Attention holds its scores and their softmax beside what it gives. What a runtime adds, such as packed copies of
    weights and scratch space of kernels, is not known here: the estimate serves to compare two models.
    """

    counter: Counter

    def __call__(self, removed: Removed, dropped: Dropped = _NOTHING) -> int:
        """Return the estimated bytes after a cut.

        Args:
            removed: By space, the classes that the cut removes.
            dropped: Nodes that no longer run, of branches that are left out.
        """
        held = self.weights(removed, dropped) + self.constants(removed, dropped)
        return held + self.activations(removed, dropped)

    def weights(self, removed: Removed, dropped: Dropped = _NOTHING) -> int:
        """Return the bytes of the parameters that are left."""
        left = self.counter.parameters_left(removed, dropped)
        return sum(numbers * self._width(key) for key, numbers in left.items())

    def constants(self, removed: Removed, dropped: Dropped = _NOTHING) -> int:
        """Return the bytes of what calls read that follows from no input and no parameter: masks, positions, tables.

        What is computed of buffers alone counts in place of them, since a runtime computes it once. The statistics of
        batch norms, which are folded, do not count.
        """
        sizes: dict[Key, int] = {}
        for call in self.counter.running(removed, dropped):
            if operator_name(call.node) not in BATCH_NORMS:
                for node, key, shape in zip(call.node.all_input_nodes, call.reads, call.inputs, strict=True):
                    if node in self._constant and shape is not None:
                        sizes[key] = math.prod(shape) * self._width(key)
        return sum(sizes.values())

    def activations(self, removed: Removed, dropped: Dropped = _NOTHING) -> int:
        """Return the bytes of the largest set of activations that are live at once."""
        recording = self.counter.coupling.recording
        calls = list(self.counter.running(removed, dropped))
        source = self._sources(dropped)
        read = [Tally(map(source, call.reads)) for call in calls]
        uses = Tally(self._inputs)  # the caller holds what goes in, and what comes out
        for reads in read:
            uses.update(reads)
        uses.update(source(recording.key(node)) for node in recording.graph.graph.output_node().all_input_nodes)
        buffers = _Buffers(uses)
        for key in self._inputs:
            buffers.make(key, math.prod(self.counter.coupling.single[key]) * self._width(key))
        peak = buffers.live
        for call, reads in zip(calls, read, strict=True):
            operands = list(map(source, call.reads))
            for key, shape in zip(call.gives, call.outputs, strict=True):
                buffers.give(key, math.prod(shape) * self._width(key), self._places[call.node], operands)
            peak = max(peak, buffers.live + self._scratch(call))
            buffers.done(reads, call.gives)
        return peak

    @cached_property
    def _inputs(self) -> list[Key]:
        recording = self.counter.coupling.recording
        keys = [recording.key(node) for node in recording.graph.graph.find_nodes(op="placeholder")]
        return [key for key in keys if key in recording.shapes]

    @cached_property
    def _constant(self) -> set[Node]:
        """Nodes that depend neither on inputs nor on parameters."""
        recording = self.counter.coupling.recording
        constant: set[Node] = set()
        for node in recording.graph.graph.nodes:
            stored = node.op == "get_attr" and not recording.is_parameter(recording.key(node))
            if stored or (node.op == "call_function" and constant.issuperset(node.all_input_nodes)):
                constant.add(node)
        return constant

    def _sources(self, dropped: Dropped) -> Callable[[Key], Key]:
        """Return what tells the tensor that is read in place of one: the shortcut of a branch that is left out."""
        gone, made, inputs = frozenset(dropped), self._made if dropped else {}, set(self._inputs)

        def source(key: Key) -> Key:
            while key in made and made[key].node.name in gone:
                data = [read for read in made[key].reads if read in made or read in inputs]
                # Where all that it reads is dropped too, each of it leads to the entry of the branch.
                key = next((read for read in data if read not in made or made[read].node.name not in gone), data[0])
            return key

        return source

    @cached_property
    def _made(self) -> dict[Key, RunningCall]:
        """By tensor: the call that makes it, not one that takes it out of several."""
        made: dict[Key, RunningCall] = {}
        for call in self.counter.running({}):
            for key in call.gives:
                made.setdefault(key, call)
        return made

    @cached_property
    def _places(self) -> dict[Node, bool | None]:
        return {call.node: _place_of(call.node) for call in self.counter.running({})}

    def _width(self, key: Key) -> int:
        return self.counter.coupling.recording.dtypes[key].itemsize

    def _scratch(self, call: RunningCall) -> int:
        """Return the bytes that a call holds beside what it reads and gives."""
        if operator_name(call.node) != _ATTENTION:
            return 0
        shapes = dict(zip(call.node.all_input_nodes, call.inputs, strict=True))
        # By name: one tensor may be query and key, and stands once among the inputs then.
        query, key = (shapes[get_argument(call.node, name)] for name in ("query", "key"))
        if query is None or key is None:
            return 0
        return 2 * math.prod(query[:-1]) * key[-2] * self._width(call.gives[0])


def _place_of(node: Node) -> bool | None:
    """Whether a call's result lies where its operand lies: always, never, or (None) if nobody else reads that."""
    name = operator_name(node)
    if name in _SAME_PLACE or (name == "slice" and _leaves_nothing_out(node)):
        return True
    return None if name in BATCH_NORMS or is_pointwise(node, name) else False


def _leaves_nothing_out(node: Node) -> bool:
    """Whether a slice takes a whole axis, as indexing by a colon does; a runtime drops it."""
    start, end, step = (get_argument(node, name) for name in ("start", "end", "step"))
    return start in (None, 0) and (end is None or end == sys.maxsize) and step == 1


class _Buffers:
    """The memory of activations: each is freed after the last read of whatever lies in it.

    Args:
        uses: By tensor, how often it is read.
    """

    def __init__(self, uses: Tally[Key]) -> None:
        self._uses = uses
        self._lies: dict[Key, Key] = {}
        self._bytes: dict[Key, int] = {}
        self._reads: dict[Key, int] = {}
        self.live = 0

    def make(self, key: Key, size: int) -> None:
        """Take memory for a tensor."""
        self._lies[key], self._bytes[key], self._reads[key] = key, size, self._uses[key]
        self.live += size

    def give(self, key: Key, size: int, same_place: bool | None, reads: Iterable[Key]) -> None:
        """Find a place for what a call gives."""
        if key in self._lies:  # one tensor of several, taken out
            return
        operands = Tally(self._lies[read] for read in reads if read in self._lies)
        if same_place is None:
            operands = Tally(
                {
                    buffer: count
                    for buffer, count in operands.items()
                    if self._reads[buffer] == count and self._bytes[buffer] == size
                }
            )
        if same_place is False or not operands:
            self.make(key, size)
            return
        buffer = next(iter(operands))
        self._lies[key] = buffer
        self._reads[buffer] += self._uses[key]

    def done(self, reads: Tally[Key], gives: Sequence[Key]) -> None:
        """Free what nobody reads any more after a call."""
        touched = [self._lies[key] for key in gives]
        for key, count in reads.items():
            if key in self._lies:
                self._reads[self._lies[key]] -= count
                touched.append(self._lies[key])
        for buffer in dict.fromkeys(touched):
            if not self._reads[buffer]:
                self.live -= self._bytes.pop(buffer, 0)
