"""Reordering coupled classes, or their entries within groups and heads, while the model computes the same.

Classes in the order of their importance make a prefix of every axis a good smaller net; entries in the order of theirs
let a cut take other channels from every group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import GraphModule, Interpreter
from torch.utils import _pytree as pytree

from mil_cli.graph.coupling.coupling import Coupling, Space
from mil_cli.graph.coupling.cut import named_tensor
from mil_cli.graph.coupling.disjoint import Labels
from mil_cli.graph.coupling.equivalence import TOLERANCE, Call, relative_difference
from mil_cli.graph.coupling.record import flat_inputs
from mil_cli.graph.coupling.rows import Rows, lines_of
from mil_cli.graph.nodes import get_attribute


def reorder(
    graph: GraphModule, coupling: Coupling, scores: Sequence[NDArray[np.float64]], inputs: Iterable[Call]
) -> list[int]:
    """Permute the weights of a graph in place so that in each space the free classes fall in importance.

    The analysis stays valid: class k of a space is then the k-th most important one. Classes that cannot be cut keep
    their places. A space whose order cannot change without changing what the graph computes (its classes are of
    different sizes, or a channel shuffle gathers them by constant positions) is left as it is.

    Args:
        graph: Has the weights by the analysed graph's names.
        coupling: Its analysis.
        scores: Importance by space and class, such as `group_norms` gives.
        inputs: Inputs, as (args, kwargs), on which the new order must give the old outputs.

    Returns:
        The spaces that were put in order.
    """
    moves = {}
    for number, space in enumerate(coupling.spaces):
        if _uniform(space) and _owned(graph, coupling, space):
            places = [(member.parameter, member.axis, member.classes) for member in space.members]
            moves[number] = _Move(places, _falling(space, scores[number]))
    return _move_if_equal(graph, coupling, moves, inputs)


def arrange(
    graph: GraphModule,
    coupling: Coupling,
    rows: Mapping[int, Rows],
    orders: Mapping[int, NDArray[np.int64]],
    inputs: Iterable[Call],
) -> list[int]:
    """Permute the weights of a graph in place so that each row of a space has its entries in an order of its own.

    The analysis stays valid: class k of a space then holds, of each row r, the entry that was of the free class
    ``orders[r, k]``. The model computes the same.

    Args:
        graph: Has the weights by the analysed graph's names.
        coupling: Its analysis.
        rows: By space, what `find_rows` gave.
        orders: By space: permutations of the free classes by place, shape ``(rows, free classes)``.
        inputs: Inputs, as (args, kwargs), on which the new order must give the old outputs.

    Returns:
        The spaces that were arranged; others would not have given the old outputs, and are left as they are.
    """
    moves = {}
    kept = set(graph.state_dict())  # what is not in it, a checkpoint would not bring back
    for number, found in rows.items():
        space = coupling.spaces[number]
        if not _owned(graph, coupling, space) or not all(kept & set(member.names) for member in space.members):
            continue
        moved = np.arange(found.size)
        moved[found.entries] = np.take_along_axis(found.entries, orders[number], axis=1)
        places = [
            (member.parameter, member.axis, found.places[f"@{member.parameter}"][member.axis])
            for member in coupling.spaces[number].members
        ]
        moves[number] = _Move(places, moved)
    return _move_if_equal(graph, coupling, moves, inputs)


@dataclass(frozen=True, eq=False)
class _Move:
    """A permutation of labels, and where they lie.

    Attributes:
        places: Name of a weight, its axis, and the labels along it: a vector, or as `Rows.places` has them.
        moved: For each label the label whose entries it gets.
    """

    places: Sequence[tuple[str, int, Labels]]
    moved: NDArray[np.int64]

    def inverse(self) -> _Move:
        return _Move(self.places, np.argsort(self.moved))


def _move_if_equal(
    graph: GraphModule, coupling: Coupling, moves: Mapping[int, _Move], inputs: Iterable[Call]
) -> list[int]:
    """Make all moves if the outputs stay, else those one by one that leave them; return which."""
    calls = [flat_inputs(coupling.graph, args, kwargs) for args, kwargs in inputs]
    expected = _outputs(graph, calls)
    for move in moves.values():
        _make(graph, move)
    if _equal(expected, _outputs(graph, calls)):
        return list(moves)
    for move in reversed(list(moves.values())):
        _make(graph, move.inverse())
    done = []
    for number, move in moves.items():
        _make(graph, move)
        if _equal(expected, _outputs(graph, calls)):
            done.append(number)
        else:
            _make(graph, move.inverse())
    return done


def _outputs(graph: GraphModule, calls: Sequence[Sequence[Any]]) -> list[torch.Tensor]:
    with torch.no_grad():
        results = [Interpreter(graph).run(*call, enable_io_processing=False) for call in calls]
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]


def _equal(expected: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> bool:
    return all(relative_difference(one, other) <= TOLERANCE for one, other in zip(expected, given, strict=True))


def _falling(space: Space, scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return for each class the class whose entries it gets for importance to fall."""
    free = np.array(space.free, dtype=np.int64)
    moved = np.arange(space.size)
    moved[free] = free[np.argsort(-scores[free], kind="stable")]
    return moved


def _make(graph: GraphModule, move: _Move) -> None:
    for name, axis, labels in move.places:
        tensor = named_tensor(graph, name)
        if tensor is not None and tensor.is_floating_point():
            with torch.no_grad():
                tensor.copy_(_permuted(tensor.detach(), axis, labels, move.moved))


def _permuted(tensor: torch.Tensor, axis: int, labels: Labels, moved: NDArray[np.int64]) -> torch.Tensor:
    if labels.size == labels.shape[-1 if labels.ndim == 1 else axis]:
        return tensor.index_select(axis, torch.from_numpy(_entry_order(labels.reshape(-1), moved)))
    lines = lines_of(labels, axis)
    unique, which = np.unique(lines, axis=0, return_inverse=True)
    orders = np.stack([_entry_order(line, moved) for line in unique])[which.reshape(-1)]
    shape = [*(size for place, size in enumerate(labels.shape) if place != axis), labels.shape[axis]]
    index = torch.from_numpy(np.moveaxis(orders.reshape(shape), -1, axis).copy())
    return tensor.gather(axis, index.expand(tensor.shape))


def _owned(graph: GraphModule, coupling: Coupling, space: Space) -> bool:
    """Whether all numbers that would move are the graph's own, not those of a region that the analysis inlined."""
    return all(
        named_tensor(graph, member.parameter) is not None
        for member in space.members
        if get_attribute(coupling.graph, member.parameter).is_floating_point()
    )


def _uniform(space: Space) -> bool:
    """Whether all free classes have as many entries as each other on every axis."""
    for member in space.members:
        counts = np.bincount(member.classes[member.classes >= 0], minlength=space.size)[list(space.free)]
        if counts.size and (counts != counts[0]).any():
            return False
    return len(space.free) > 1


def _entry_order(classes: Labels, moved: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each position of an axis the position whose entry it gets.

    Args:
        classes: The class of each position, -1 for none.
        moved: For each class the class whose entries it gets, in their order.
    """
    order = np.arange(len(classes))
    places = {label: np.flatnonzero(classes == label) for label in np.unique(classes).tolist() if label >= 0}
    for label, positions in places.items():
        order[positions] = places[int(moved[label])]
    return order
