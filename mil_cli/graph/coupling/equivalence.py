"""The proof of a cut: on real inputs the cut graph gives what the original gives with the removed entries at zero.

The reference is the analysed graph, run with every removed entry of every weight and every intermediate tensor set to
zero. Where an op takes statistics over an axis that is cut (layer norm over features), zero is not the same as gone:
there the reference runs that one op on the entries that are kept, as the cut graph does, and everything around it is
still compared in full. The ops for which this was done are listed in the report.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node, map_arg
from torch.utils import _pytree as pytree

from mil_cli.graph.branches import COND, branch_path, choose_branch
from mil_cli.graph.coupling.coupling import Coupling, Removed
from mil_cli.graph.coupling.cut import named_tensor
from mil_cli.graph.coupling.record import Key, flat_inputs
from mil_cli.graph.coupling.selection import Mask, Masks, keep_masks, repair

TOLERANCE = 1e-4
"""Largest difference that counts as equal, relative to the largest value of the output (float32)."""

Call = tuple[Sequence[Any], Mapping[str, Any]]
Decisions = tuple[bool, ...]


@dataclass(frozen=True)
class EquivalenceReport:
    """What the comparison of a cut with its reference showed.

    Attributes:
        equivalent: Whether every output agrees on all inputs.
        difference: Largest difference, relative to the largest value of its output; infinite where shapes, types or
            non-finite values differ.
        samples: Number of calls compared.
        failed: Indices of the spaces without which the rest is equivalent; empty if the cut is.
        compacted: Names of the ops that take statistics over cut axes, so that the reference ran them on what is kept.
    """

    equivalent: bool
    difference: float
    samples: int
    failed: tuple[int, ...]
    compacted: tuple[str, ...]


def check_graphs(
    coupling: Coupling,
    removed: Removed,
    cut: GraphModule,
    inputs: Iterable[Call],
    *,
    recut: Callable[[Removed], GraphModule],
    original: GraphModule | None = None,
    tolerance: float = TOLERANCE,
) -> EquivalenceReport:
    """Compare a cut graph with the masked original; if they differ, find the spaces that are to blame.

    Args:
        coupling: The analysis that the cut was made by.
        removed: What was removed.
        cut: The cut graph.
        inputs: Real inputs, as (args, kwargs).
        recut: Makes another cut of the same graph, to find the culprits by bisection.
        original: Has the present weights by name, where they changed after the analysis.
        tolerance: Largest relative difference.
    """
    calls = list(inputs)
    difference, compacted = _difference(coupling, removed, cut, calls, original)
    failed: tuple[int, ...] = ()
    if not difference <= tolerance:

        def differs(subset: Mapping[int, Iterable[int]]) -> bool:
            allowed = repair(coupling, subset)
            return not _difference(coupling, allowed, recut(allowed), calls, original)[0] <= tolerance

        failed = _culprits({number: set(classes) for number, classes in removed.items()}, differs)
    return EquivalenceReport(
        equivalent=difference <= tolerance,
        difference=difference,
        samples=len(calls),
        failed=failed,
        compacted=compacted,
    )


def _culprits(
    removed: Mapping[int, set[int]], differs: Callable[[Mapping[int, Iterable[int]]], bool]
) -> tuple[int, ...]:
    """Return spaces whose removal makes a difference, each found by halving; the rest makes none."""
    remaining = dict(removed)
    found: list[int] = []
    while remaining and (not found or differs(remaining)):
        suspects = list(remaining)
        while len(suspects) > 1:
            half = suspects[: len(suspects) // 2]
            if differs({number: remaining[number] for number in half}):
                suspects = half
                continue
            others = suspects[len(suspects) // 2 :]
            if not differs({number: remaining[number] for number in others}):
                break  # only together: freeze both halves
            suspects = others
        for number in suspects:
            found.append(number)
            del remaining[number]
    return tuple(sorted(found))


def _difference(
    coupling: Coupling, removed: Removed, cut: GraphModule, calls: Sequence[Call], original: GraphModule | None
) -> tuple[float, tuple[str, ...]]:
    """Return the largest relative difference over all calls and outputs, and the ops that were compacted."""
    masks = keep_masks(coupling, removed)
    statistics = {
        name
        for number, classes in removed.items()
        for label in classes
        for name in coupling.spaces[number].inexact.get(label, ())
    }
    reference = _Masked(coupling, masks, cut, statistics, original)
    largest = 0.0
    for (args, kwargs), decisions in itertools.product(calls, _all_decisions(coupling.graph)):
        flat = flat_inputs(coupling.graph, args, kwargs)
        reference.decisions = decisions
        with torch.no_grad():
            try:
                expected = pytree.tree_leaves(reference.run(*flat, enable_io_processing=False))
                given = pytree.tree_leaves(_Decided(cut, decisions).run(*flat, enable_io_processing=False))
            except (RuntimeError, IndexError):  # a shape that the rewriting got wrong, or a branch not meant for these
                return float("inf"), tuple(sorted(reference.compacted))
        largest = max([largest, *(relative_difference(a, b) for a, b in zip(expected, given, strict=True))])
    return largest, tuple(sorted(reference.compacted))


def _all_decisions(graph: GraphModule) -> list[Decisions]:
    """Return what makes every branch of a graph run: the inputs' own decisions, then each made at every depth."""
    choices = graph.graph.find_nodes(op="call_function", target=choose_branch)
    deepest = max((1 + len(branch_path(choice)) for choice in choices), default=0)
    return [(), *itertools.product((True, False), repeat=deepest)] if deepest else [()]


class _Decided(Interpreter):
    """Runs a cut graph with the branches that are asked for.

    Args:
        graph: The graph, or that of a branch.
        decisions: Which branch is taken by the calls here, by those in it, and so on; empty if the inputs decide.
    """

    def __init__(self, graph: GraphModule, decisions: Decisions) -> None:
        super().__init__(graph)
        self._decisions = decisions

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is COND and self._decisions:
            _, when_true, when_false, operands = args
            taken = when_true if self._decisions[0] else when_false
            return _Decided(taken, self._decisions[1:]).run(*operands)
        return super().call_function(target, args, kwargs)


def relative_difference(expected: Any, given: Any) -> float:
    """Return the largest difference of two outputs relative to the largest expected value; infinite if unlike."""
    if not isinstance(expected, Tensor) or not isinstance(given, Tensor):
        return 0.0 if expected == given else float("inf")
    if expected.shape != given.shape or expected.dtype != given.dtype:
        return float("inf")
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(expected, given) else float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(given)):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(float(expected[finite].abs().max()), 1e-12)
    return float((expected - given)[finite].abs().max()) / scale


class _Masked(Interpreter):
    """Runs the analysed graph with every removed entry at zero.

    Args:
        coupling: The analysis.
        masks: What each axis keeps.
        cut: The cut graph, from which the ops in `statistics` are taken.
        statistics: Names of nodes that take statistics over cut axes.
        original: Has the present weights by name.
    """

    def __init__(
        self, coupling: Coupling, masks: Masks, cut: GraphModule, statistics: set[str], original: GraphModule | None
    ) -> None:
        super().__init__(coupling.graph)
        self._recording = coupling.recording
        self._masks = masks
        self._cut = {
            node.name: node for part in cut.modules() if isinstance(part, GraphModule) for node in part.graph.nodes
        }
        self._statistics = statistics
        self._original = original
        self._leaves: dict[Key, Tensor] = {}
        self.compacted: set[str] = set()
        self.decisions: Decisions = ()

    def run_node(self, n: Node) -> Any:
        if n.op == "get_attr":
            return self._leaf(n)
        if n.name in self._statistics and n.name in self._cut and self._is_cut(n):
            return self._compact(n)
        if n.target is choose_branch and self.decisions:
            result = self.fetch_args_kwargs_from_env(n)[0][1 if self.decisions[len(branch_path(n))] else 2]
        else:
            result = super().run_node(n)
        if isinstance(result, Tensor):
            return _zeroed(result, self._masks.get(self._recording.key(n)), in_place=n.op == "call_function")
        if isinstance(result, tuple | list):
            for position, element in enumerate(result):
                if isinstance(element, Tensor):
                    _zeroed(element, self._masks.get(f"{n.name}#{position}"), in_place=True)
        return result

    def _leaf(self, node: Node) -> Any:
        key = self._recording.key(node)
        if key not in self._recording.leaves:
            return super().run_node(node)
        if key not in self._leaves:
            tensor = self._present(key)
            self._leaves[key] = _zeroed(tensor.detach().clone(), self._masks.get(key), in_place=True)
        return self._leaves[key]

    def _present(self, key: Key) -> Tensor:
        leaf = self._recording.leaves[key]
        if self._original is not None:
            present = named_tensor(self._original, self._recording.leaf_names[key][0])
            if present is not None and present.shape == leaf.shape:
                return present
        return leaf

    def _is_cut(self, node: Node) -> bool:
        return any(self._recording.key(used) in self._masks for used in node.all_input_nodes)

    def _compact(self, node: Node) -> Any:
        """Run one op on what is kept of its operands, as the cut graph does, and put zeros back around the result."""
        small = self._cut[node.name]
        operands = {
            after: self._kept(self.env[before], self._recording.key(before))
            for before, after in zip(node.all_input_nodes, small.all_input_nodes, strict=True)
        }

        def operand(used: Node) -> Any:
            return operands[used]

        result = small.target(*map_arg(small.args, operand), **map_arg(small.kwargs, operand))
        self.compacted.add(node.name)
        if isinstance(result, Tensor):
            return self._spread(result, self._recording.key(node))
        return type(result)(self._spread(part, f"{node.name}#{number}") for number, part in enumerate(result))

    def _kept(self, value: Any, key: Key) -> Any:
        if isinstance(value, Tensor):
            for axis, mask in self._masks.get(key, {}).items():
                value = value.index_select(axis, _indices(_fitted(mask, value.shape[axis])))
        return value

    def _spread(self, value: Tensor, key: Key) -> Tensor:
        for axis, mask in self._masks.get(key, {}).items():
            size = value.shape[axis] * len(mask) // int(mask.sum())
            shape = list(value.shape)
            shape[axis] = size
            value = value.new_zeros(shape).index_copy(axis, _indices(_fitted(mask, size)), value)
        return value


def _fitted(mask: Mask, size: int) -> Mask:
    """Return a mask for an axis of another batch size.

    Such an axis holds batch x heads or heads x batch, so the mask of the analysed batch is either periodic or made of
    equal runs; both say what one sample keeps.
    """
    if len(mask) == size:
        return mask
    for period in range(1, len(mask)):
        if len(mask) % period == size % period == 0 and bool((mask.reshape(-1, period) == mask[:period]).all()):
            return np.tile(mask[:period], size // period)
    for run in range(len(mask), 1, -1):
        if len(mask) % run == 0 and bool((mask.reshape(-1, run) == mask.reshape(-1, run)[:, :1]).all()):
            return np.repeat(mask[::run], size * run // len(mask))
    return mask


def _indices(mask: Mask) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask))


def _zeroed(value: Tensor, masks: Mapping[int, Mask] | None, *, in_place: bool) -> Tensor:
    """Return `value` with what the masks do not keep at zero; in place, so that views of it see it too."""
    if not masks or not (value.is_floating_point() or value.is_complex()):
        return value
    if not in_place or _overlaps(value):
        value = value.clone()
    for axis, mask in masks.items():
        value.index_fill_(axis, _indices(~_fitted(mask, value.shape[axis])), 0)
    return value


def _overlaps(value: Tensor) -> bool:
    """Return whether several entries share memory, as in an expanded tensor."""
    return any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True))
