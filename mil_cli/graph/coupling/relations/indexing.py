"""Gathering by index tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch.fx import Node

from mil_cli.graph.coupling.record import Key
from mil_cli.graph.coupling.table import Operation, Rules, UnsupportedForm, rules_for

_INDEXED = "the axis is indexed by a tensor"


def index_select(operation: Operation) -> None:
    """Relate each entry to where it is gathered, if the index is a constant."""
    data, output = operation.need("self"), operation.output
    axis = operation.axis(data, operation.value("dim"))
    index = operation.argument("index")
    if not isinstance(index, Node) or index.op != "get_attr":
        for key in (data, output):
            operation.freeze(key, axis, _INDEXED)
        operation.freeze_all([operation.need("index")], _INDEXED)
    else:
        gathered = np.atleast_1d(operation.value("index").numpy()).astype(np.int64)
        operation.link(data, axis, output, axis, gathered, np.arange(len(gathered)))
    operation.link_all(data, output, but=(axis,))


def index(operation: Operation) -> None:
    """Freeze the indexed axes; relate the others, which stand around the result's index axes."""
    data, output = operation.need("self"), operation.output
    kept, first, indexed = _indexed_axes(operation, data)
    for axis, target in kept.items():
        operation.link(data, axis, output, target)
    operation.freeze(output, range(first, first + indexed), _INDEXED)


def _indexed_axes(operation: Operation, data: Key) -> tuple[dict[int, int], int, int]:
    """Freeze the axes of `data` that ``indices`` take, and the indices themselves.

    Integers take one axis each and are broadcast; a mask takes as many axes as it has, and gives one.

    Returns:
        The axis of the result for each axis that is left, then the first axis of the result that the indices make, and
        how many they make.
    """
    given = [None if tensor is None else operation.key_of(tensor) for tensor in operation.argument("indices")]
    positions = [position for position, key in enumerate(given) if key is not None]
    if not positions:
        raise UnsupportedForm("no index")
    taken: list[int] = []
    ranks: list[int] = []
    axis = start = 0
    for position, key in enumerate(given):
        start = axis if position == positions[0] else start
        masked = key is not None and operation.dtype(key) in (torch.bool, torch.uint8)
        width = operation.rank(key) if key is not None and masked else 1
        if key is not None:
            taken.extend(range(axis, axis + width))
            ranks.append(1 if masked else operation.rank(key))
        axis += width
    indexed = max(ranks)
    first = start if positions == list(range(positions[0], positions[-1] + 1)) else 0
    operation.freeze(data, taken, _INDEXED)
    operation.freeze_all([key for key in given if key is not None], _INDEXED)
    rest = [axis for axis in range(operation.rank(data)) if axis not in taken]
    kept = {axis: number + (indexed if number >= first else 0) for number, axis in enumerate(rest)}
    return kept, first, indexed


def index_put(operation: Operation) -> None:
    """Freeze the indexed axes; what is written stands or falls with the rest of what it is written into."""
    data, output, values = operation.need("self"), operation.output, operation.need("values")
    kept, _, indexed = _indexed_axes(operation, data)
    for axis in kept:
        operation.link(data, axis, output, axis)
    offset = operation.rank(values) - len(kept) - indexed
    for axis, target in kept.items():
        if target + offset >= 0 and operation.shape(values)[target + offset] == operation.shape(data)[axis]:
            operation.link(values, target + offset, data, axis)


def scatter(operation: Operation) -> None:
    """Freeze the axis along which entries find their place by an index; relate the others."""
    data, output = operation.need("self"), operation.output
    axis = operation.axis(data, operation.value("dim"))
    reason = f"{operation.name} places entries by an index"
    spread = operation.name in ("index_add", "index_copy", "index_fill", "index_add_", "index_copy_", "index_fill_")
    index = operation.need("index")
    if spread:
        operation.freeze_all([index], reason)
    for key in [data, output, *(key for key in operation.inputs if key not in ((data, index) if spread else (data,)))]:
        if operation.rank(key) != operation.rank(data):
            operation.freeze_all([key], reason)
            continue
        operation.freeze(key, axis, reason)
        _link_others(operation, key, axis, otherwise=output, reason=reason)


def _link_others(operation: Operation, key: Key, axis: int, *, otherwise: Key | None, reason: str) -> None:
    """Relate all axes of an operand but one to the result's, where both have the same size.

    Args:
        operation: The operation.
        key: The operand, of the result's rank.
        axis: The axis that is left out.
        otherwise: The tensor whose axis is frozen where the sizes differ.
        reason: Why.
    """
    output = operation.output
    for other in range(operation.rank(key)):
        if other == axis:
            continue
        if operation.shape(key)[other] == operation.shape(output)[other]:
            operation.link(key, other, output, other)
        elif otherwise is not None:
            operation.freeze(otherwise, other, reason)


def one_hot(operation: Operation) -> None:
    """Relate the axes of the numbers; the new axis counts classes."""
    data, output = operation.input, operation.output
    for axis in range(operation.rank(data)):
        operation.link(data, axis, output, axis)
    operation.freeze(output, -1, "the axis counts classes")


def gather(operation: Operation) -> None:
    """Freeze the gathered axis; relate the others between data, index and result."""
    data, chosen, output = operation.inputs[0], operation.inputs[-1], operation.output
    if len(operation.inputs) != 2 or operation.argument("dim") is None:
        raise UnsupportedForm("gathers over all axes")
    gathered = operation.axis(data, operation.value("dim"))
    for key in (data, chosen, output):
        operation.freeze(key, gathered, _INDEXED)
    _link_others(operation, chosen, gathered, otherwise=None, reason=_INDEXED)
    _link_others(operation, data, gathered, otherwise=data, reason=_INDEXED)


def triangle(operation: Operation) -> None:
    """A triangle of a matrix counts positions on the last two axes; the others pass."""
    data, output = operation.input, operation.output
    rank = operation.rank(data)
    for key in (data, output):
        operation.freeze(key, (rank - 2, rank - 1), "a triangle counts positions")
    operation.link_all(data, output, but=(rank - 2, rank - 1))


RULES: Rules = {
    **rules_for(triangle, "triu", "tril", "triu_", "tril_"),
    **rules_for(index_select, "index_select"),
    **rules_for(index, "index"),
    **rules_for(index_put, "index_put", "index_put_"),
    **rules_for(gather, "gather", "take_along_dim"),
    **rules_for(
        scatter,
        *(
            f"{name}{suffix}"
            for suffix in ("", "_")
            for name in ("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill")
        ),
    ),
    **rules_for(one_hot, "one_hot"),
}
