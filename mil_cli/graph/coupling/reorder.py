"""Reordering coupled classes, so that the important ones come first and a prefix of every axis is a good smaller net.

The model computes the same: all axes that a space labels are permuted alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import GraphModule, Interpreter
from torch.utils import _pytree as pytree

from mil_cli.graph.coupling.coupling import Coupling, Space
from mil_cli.graph.coupling.cut import named_tensor
from mil_cli.graph.coupling.equivalence import TOLERANCE, Call, relative_difference
from mil_cli.graph.coupling.record import flat_inputs
from mil_cli.graph.coupling.space import Labels
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
    calls = [flat_inputs(coupling.graph, args, kwargs) for args, kwargs in inputs]
    expected = _outputs(graph, calls)
    moves = {number: _moves(space, scores[number]) for number, space in enumerate(coupling.spaces) if _uniform(space)}
    for number, moved in moves.items():
        _permute(graph, coupling, number, moved)
    if _equal(expected, _outputs(graph, calls)):
        return list(moves)
    for number, moved in reversed(moves.items()):
        _permute(graph, coupling, number, np.argsort(moved))
    done = []
    for number, moved in moves.items():
        _permute(graph, coupling, number, moved)
        if _equal(expected, _outputs(graph, calls)):
            done.append(number)
        else:
            _permute(graph, coupling, number, np.argsort(moved))
    return done


def _outputs(graph: GraphModule, calls: Sequence[Sequence[Any]]) -> list[torch.Tensor]:
    with torch.no_grad():
        results = [Interpreter(graph).run(*call, enable_io_processing=False) for call in calls]
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]


def _equal(expected: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> bool:
    return all(relative_difference(one, other) <= TOLERANCE for one, other in zip(expected, given, strict=True))


def _moves(space: Space, scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return for each class the class whose entries it gets."""
    free = np.array(space.free, dtype=np.int64)
    moved = np.arange(space.size)
    moved[free] = free[np.argsort(-scores[free], kind="stable")]
    return moved


def _permute(graph: GraphModule, coupling: Coupling, number: int, moved: NDArray[np.int64]) -> None:
    for member in coupling.spaces[number].members:
        tensor = _tensor(graph, coupling, member.parameter)
        if tensor.is_floating_point():
            order = torch.from_numpy(_entry_order(member.classes, moved))
            with torch.no_grad():
                tensor.copy_(tensor.detach().index_select(member.axis, order))


def _tensor(graph: GraphModule, coupling: Coupling, name: str) -> torch.Tensor:
    own = named_tensor(graph, name)
    tensor: torch.Tensor = get_attribute(coupling.graph, name) if own is None else own
    return tensor


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
