"""Finding all spaces of a graph: where labels begin, and what is tried when a view divides them."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Interpreter, Node

from mil_cli.graph.branches import choose_branch, inline_branches
from mil_cli.graph.coupling.coupling import Coupling, Frozen, Member, Space
from mil_cli.graph.coupling.disjoint import NO_LABEL, Labels
from mil_cli.graph.coupling.draft import draft_of
from mil_cli.graph.coupling.normalise import normalise
from mil_cli.graph.coupling.operators import argument, has_argument, operator_name
from mil_cli.graph.coupling.record import Key, Recording, flat_inputs, record
from mil_cli.graph.coupling.relations import relate
from mil_cli.graph.coupling.relations.convolution import NAMES as CONVOLUTIONS
from mil_cli.graph.coupling.space import Propagation, Reason, Seed, SplitByView
from mil_cli.graph.coupling.table import RelationTable
from mil_cli.graph.nodes import source_line
from mil_cli.graph.regions import inline_regions

_DEEPEST_SPLIT = 4

_WEIGHTS: Mapping[str, Sequence[tuple[str, int]]] = {
    "embedding": [("weight", 1)],
    "embedding_bag": [("weight", 1)],
    "matmul": [("other", -1), ("self", -2)],
    "mm": [("mat2", -1), ("self", -2)],
    "bmm": [("mat2", -1), ("self", -2)],
    "addmm": [("mat2", -1), ("mat1", -2)],
    "baddbmm": [("batch2", -1), ("batch1", -2)],
    "mv": [("self", -2)],
    "tensordot": [("other", -1), ("self", 0)],
    "bilinear": [("weight", 0)],
    "cdist": [("x2", -2), ("x1", -2)],
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), (("w_hh", 1),)),
}
"""Op -> its arguments that may be weights, each with the axis of what it gives."""


def analyse_graph(
    graph: GraphModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    resized: Callable[[int], tuple[Sequence[Any], Mapping[str, Any]]] | None = None,
) -> Coupling:
    """Find everything that must be cut together in a captured graph; the graph is not changed.

    Views are aligned by the sizes of one run, so a batch that equals another size by accident could align what does
    not belong together. With `resized` that is excluded: the run's batch is a prime that divides no size of a single
    sample, so that sizes agree with it only where they hold the batch.

    Args:
        graph: A captured graph in eval form.
        args: Example inputs.
        kwargs: Example keyword inputs.
        resized: Gives the inputs with any batch size, if the graph takes any: `args` and `kwargs` are not used then.
    """
    try:
        recording, shapes = _recorded(graph, args, kwargs or {}, resized, branches=True)
    except (RuntimeError, IndexError):  # a branch that these inputs do not take may be unable to run on them
        recording, shapes = _recorded(graph, args, kwargs or {}, resized, branches=False)
    table = relate(recording)
    found = deque(_Search(table).run())
    spaces: list[Space] = []
    frozen: list[Frozen] = []
    while found:  # each is let go at once: together they would take as much memory again as what is made of them
        propagation, seed = found.popleft()
        spaces.append(_space_of(propagation, seed, recording))
        frozen.extend(_frozen_of(propagation, recording))
    return Coupling(
        table=table,
        spaces=tuple(spaces),
        frozen=tuple(frozen),
        unknown=tuple((node.name, reason, source_line(node) or "") for node, reason in table.unknown),
        single=shapes,
    )


def _recorded(
    graph: GraphModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    resized: Callable[[int], tuple[Sequence[Any], Mapping[str, Any]]] | None,
    *,
    branches: bool,
) -> tuple[Recording, Mapping[Key, tuple[int, ...]]]:
    """Run a normalised copy of a graph, both branches of every choice if asked, and add the shapes of one sample."""
    copy = draft_of(graph)
    inline_regions(copy)
    if branches:
        inline_branches(copy)
        if copy.graph.find_nodes(op="call_function", target=choose_branch):
            # A proof runs both branches; shapes alone would not show that one looks up what its table does not have.
            single_args, single_kwargs = (args, kwargs) if resized is None else resized(1)
            with torch.no_grad():
                Interpreter(copy).run(*flat_inputs(copy, single_args, single_kwargs), enable_io_processing=False)
    if resized is None:
        recording = record(copy, args, kwargs)
        normalise(recording)
        return recording, recording.shapes
    single = record(copy, *resized(1)).shapes
    batch = _batch_unlike(single)
    recording = record(copy, *resized(batch))
    normalise(recording)
    return recording, _of_one_sample(single, recording.shapes, batch)


def _batch_unlike(shapes: Mapping[Key, tuple[int, ...]]) -> int:
    """Return the smallest prime from 5 on that divides no size; 5 if there is none below 1000."""
    sizes = {size for shape in shapes.values() for size in shape if size}
    primes = (
        number for number in range(5, 1000, 2) if all(number % part for part in range(3, int(number**0.5) + 1, 2))
    )
    return next((prime for prime in primes if all(size % prime for size in sizes)), 5)


def _of_one_sample(
    single: Mapping[Key, tuple[int, ...]], shapes: Mapping[Key, tuple[int, ...]], batch: int
) -> dict[Key, tuple[int, ...]]:
    """Return the shapes for one sample: those of its run, or a share of the whole where that has other axes."""
    return {
        key: single[key]
        if len(single.get(key, ())) == len(shape) > 0
        else tuple(size if size % batch else size // batch for size in shape)
        for key, shape in shapes.items()
    }


class _Search:
    """Seeds every output axis of every weight that is not yet covered, and keeps each distinct space."""

    def __init__(self, table: RelationTable) -> None:
        self._table = table
        self._recording = table.recording
        self._computed = _computed_from_parameters(table)
        self._tried: set[tuple[Key, int, bytes]] = set()
        self._signatures: set[bytes] = set()
        # by weight axis: whether each index has a label in some space, and whether one that is its alone
        self._labelled: dict[tuple[Key, int], np.ndarray[Any, np.dtype[np.bool_]]] = {}
        self._distinct: dict[tuple[Key, int], np.ndarray[Any, np.dtype[np.bool_]]] = {}
        self.found: list[tuple[Propagation, Seed]] = []

    def run(self) -> list[tuple[Propagation, Seed]]:
        for key, axis in self._origins():
            self._seed(key, axis)
        return self.found

    def _origins(self) -> Iterator[tuple[Key, int]]:
        for node in self._recording.graph.graph.nodes:
            name = operator_name(node)
            weights: list[tuple[Any, int]] = []
            if name == "linear":
                weights = [(argument(node, "weight"), 0)]
            elif name in CONVOLUTIONS:
                transposed = "transpose" in name or bool(argument(node, "transposed", False))
                weights = [(argument(node, "weight"), 1 if transposed else 0)]
            elif name in _WEIGHTS:
                weights = [(argument(node, given), axis) for given, axis in _WEIGHTS[name] if has_argument(node, given)]
            elif name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
                weights = [(weight, 1) for weight in argument(node, "params") or []]
            elif name == "einsum":
                weights = [
                    (operand, axis)
                    for operand in argument(node, "tensors")
                    for axis in range(len(self._table.shapes.get(self._recording.key(operand), ())))
                ]
            for weight, axis in weights:
                if not isinstance(weight, Node):
                    continue
                key = self._recording.key(weight)
                rank = len(self._table.shapes.get(key, ()))
                if rank >= 2 and (key in self._recording.leaves or key in self._computed):
                    yield key, axis % rank

    def _seed(self, key: Key, axis: int) -> None:
        size = self._table.shapes[key][axis]
        open_ = ~self._distinct.get((key, axis), np.zeros(size, dtype=bool))
        if size < 2 or not open_.any():
            return
        while open_.any():
            known = len(self.found)
            self._attempt(Seed(key, axis, np.where(open_, np.arange(size), NO_LABEL)), 0)
            # A view of one part of the axis divided it (the heads of queries); the other parts begin anew (of values).
            open_, before = open_ & self._missed(self.found[known:], key, axis), open_
            if np.array_equal(open_, before):
                break
        open_ = ~self._labelled.get((key, axis), np.zeros(size, dtype=bool))
        if open_.any():
            seed = Seed(key, axis, np.where(open_, np.arange(size), NO_LABEL))
            propagation = Propagation(self._table, freeze_on_split=True)
            propagation.run(seed)
            self._accept(propagation, seed)

    def _missed(
        self, found: Sequence[tuple[Propagation, Seed]], key: Key, axis: int
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return the indices of an axis that some of these spaces do not label."""
        missed = np.zeros(self._table.shapes[key][axis], dtype=bool)
        for propagation, _ in found:
            missed |= propagation.labels.get(key, {}).get(axis, np.full(len(missed), NO_LABEL)) < 0
        return missed

    def _attempt(self, seed: Seed, depth: int) -> None:
        identity = (seed.key, seed.axis, _digest(seed.labels.tobytes()))
        if identity in self._tried:
            return
        self._tried.add(identity)
        propagation = Propagation(self._table)
        try:
            propagation.run(seed)
        except SplitByView as split:
            if depth < _DEEPEST_SPLIT:
                for alternative in split.alternatives:
                    self._attempt(alternative, depth + 1)
            return
        self._accept(propagation, seed)

    def _accept(self, propagation: Propagation, seed: Seed) -> None:
        leaves = sorted(
            (key, axis, _canonical(labels).tobytes())
            for key, axes in propagation.labels.items()
            if key in self._recording.leaves
            for axis, labels in axes.items()
        )
        signature = _digest(*(part for key, axis, labels in leaves for part in (f"{key} {axis} ".encode(), labels)))
        if not leaves or signature in self._signatures:
            return
        self._signatures.add(signature)
        self.found.append((propagation, seed))
        for key, axes in propagation.labels.items():
            if key in self._recording.leaves or key in self._computed:
                for axis, labels in axes.items():
                    self._cover(key, axis, labels)

    def _cover(self, key: Key, axis: int, labels: Labels) -> None:
        labelled = labels >= 0
        classes, counts = np.unique(labels[labelled], return_counts=True)
        single = np.isin(labels, classes[counts == 1])
        nothing = np.zeros(len(labels), dtype=bool)
        self._labelled[key, axis] = self._labelled.get((key, axis), nothing) | labelled
        self._distinct[key, axis] = self._distinct.get((key, axis), nothing) | single


def _digest(*parts: bytes) -> bytes:
    """Return what tells contents apart in their stead: those of thousands of seeds would outweigh all that is found."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _canonical(labels: Labels) -> Labels:
    """Rename labels by first appearance, so that equal partitions are equal vectors; no label stays apart."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    renamed = np.argsort(np.argsort(first))[inverse]
    return np.where(labels < 0, NO_LABEL, renamed)


def _computed_from_parameters(table: RelationTable) -> set[Key]:
    """Return the tensors that depend on parameters, or on these and constants: standardised and masked weights."""
    recording = table.recording
    fixed = set(recording.leaves)
    learned = {key for key in fixed if recording.is_parameter(key)}
    for node in recording.graph.graph.nodes:
        keys = {recording.key(used) for used in node.all_input_nodes}
        if node.op == "call_function" and keys and keys <= fixed:
            fixed.add(recording.key(node))
            if keys & learned:
                learned.add(recording.key(node))
    return learned - recording.leaves.keys()


def _space_of(propagation: Propagation, seed: Seed, recording: Recording) -> Space:
    members = tuple(
        Member(
            parameter=recording.leaf_names[key][0],
            names=tuple(recording.leaf_names[key]),
            axis=axis,
            classes=labels,
            trainable=recording.is_parameter(key),
        )
        for key, axes in propagation.labels.items()
        if key in recording.leaves
        for axis, labels in axes.items()
    )
    size = 1 + max(int(labels.max()) for axes in propagation.labels.values() for labels in axes.values())
    covered = [member for member in members if member.trainable] or list(members)
    return Space(
        origin=seed.key.removeprefix("@") if seed.key in recording.leaves else covered[0].parameter,
        size=size,
        labels=propagation.labels,
        members=members,
        frozen={label: describe(reason) for label, reason in propagation.frozen.items()},
        inexact={label: frozenset(node.name for node in nodes) for label, nodes in propagation.inexact.items()},
    )


def describe(reason: Reason) -> str:
    """Return one line: what forbids the cut, at which node, made by which line of the user's code."""
    where = source_line(reason.node)
    return f"{reason.text} ({reason.node.name}{f', {where}' if where else ''})"


def _frozen_of(propagation: Propagation, recording: Recording) -> Iterator[Frozen]:
    by_reason: dict[tuple[Node, str], list[int]] = {}
    for label, reason in propagation.frozen.items():
        by_reason.setdefault((reason.node, reason.text), []).append(label)
    for key, axes in propagation.labels.items():
        if not recording.is_parameter(key) or len(recording.shapes[key]) < 2:
            continue
        for axis, labels in axes.items():
            for (node, text), frozen in by_reason.items():
                entries = int(np.isin(labels, frozen).sum())
                if entries:
                    yield Frozen(
                        parameter=recording.leaf_names[key][0],
                        axis=axis,
                        entries=entries,
                        size=len(labels),
                        node=node.name,
                        operator=operator_name(node),
                        reason=text,
                        source_line=source_line(node) or "",
                    )
