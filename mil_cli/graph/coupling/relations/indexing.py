"""Gathering by index tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch.fx import Node

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
    given = list(operation.argument("indices"))
    positions = [position for position, tensor in enumerate(given) if tensor is not None]
    if not positions:
        raise UnsupportedForm("no index")
    keys = {position: operation.key_of(given[position]) for position in positions}
    if any(operation.dtype(key) in (torch.bool, torch.uint8) for key in keys.values()):
        raise UnsupportedForm("indexed by a mask")
    broadcast = np.broadcast_shapes(*(operation.shape(key) for key in keys.values()))
    together = positions == list(range(positions[0], positions[-1] + 1))
    first = positions[0] if together else 0
    target = 0 if together else len(broadcast)
    for axis in range(operation.rank(data)):
        if together and axis == first:
            target += len(broadcast)
        if axis in keys:
            operation.freeze(data, axis, _INDEXED)
        else:
            operation.link(data, axis, output, target)
            target += 1
    operation.freeze_all(keys.values(), _INDEXED)
    operation.freeze(output, range(first, first + len(broadcast)), _INDEXED)


def gather(operation: Operation) -> None:
    """Freeze the gathered axis; relate the others between data, index and result."""
    data, chosen, output = operation.inputs[0], operation.inputs[-1], operation.output
    if len(operation.inputs) != 2 or operation.argument("dim") is None:
        raise UnsupportedForm("gathers over all axes")
    gathered = operation.axis(data, operation.value("dim"))
    for key in (data, chosen, output):
        operation.freeze(key, gathered, _INDEXED)
    for axis in range(operation.rank(data)):
        if axis == gathered:
            continue
        if operation.shape(chosen)[axis] == operation.shape(output)[axis]:
            operation.link(chosen, axis, output, axis)
        if operation.shape(data)[axis] == operation.shape(output)[axis]:
            operation.link(data, axis, output, axis)
        else:
            operation.freeze(data, axis, _INDEXED)


def triangle(operation: Operation) -> None:
    """A triangle of a matrix counts positions on the last two axes; the others pass."""
    data, output = operation.input, operation.output
    rank = operation.rank(data)
    for key in (data, output):
        operation.freeze(key, (rank - 2, rank - 1), "a triangle counts positions")
    operation.link_all(data, output, but=(rank - 2, rank - 1))


def one_hot(operation: Operation) -> None:
    """The new last axis counts numbers; the others pass."""
    chosen, output = operation.input, operation.output
    for axis in range(operation.rank(chosen)):
        operation.link(chosen, axis, output, axis)
    operation.freeze(output, operation.rank(output) - 1, "the axis counts numbers")


RULES: Rules = {
    **rules_for(triangle, "triu", "tril", "triu_", "tril_"),
    **rules_for(index_select, "index_select"),
    **rules_for(index, "index"),
    **rules_for(gather, "gather", "take_along_dim"),
    **rules_for(one_hot, "one_hot"),
}
