"""Rewriting a copy of a graph into forms whose index behaviour is explicit, before it is analysed.

* `view_as`, `reshape_as`, `expand_as` get explicit sizes, so that they no longer follow another tensor's cut shape;
* indexing one axis by a constant (positions or a mask), `channel_shuffle`, and chains of views and transposes that
  only permute one axis become `index_select` by a constant, so that a channel shuffle can be cut channel by channel;
* what is selected from a fused projection becomes a slice of it (`take_apart`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node, map_arg

from mil_cli.graph.coupling.fused import take_apart
from mil_cli.graph.coupling.operators import add_buffer, argument, operator_name
from mil_cli.graph.coupling.record import Recording
from mil_cli.graph.coupling.relations.views import VIEWS

aten = torch.ops.aten

_MOVES = frozenset({*VIEWS, "permute", "transpose", "swapaxes", "contiguous", "clone"})
_LONGEST_CHAIN = 6


def normalise(recording: Recording) -> None:
    """Rewrite single nodes of the recorded graph in place, and keep the recording true."""
    graph = recording.graph
    for node in list(graph.graph.nodes):
        name = operator_name(node)
        if name in ("view_as", "reshape_as", "expand_as"):
            _explicit_sizes(recording, node, name)
        elif name == "index":
            _index_to_select(recording, node)
        elif name == "channel_shuffle":
            channels = recording.shapes[node.name][1]
            order = torch.arange(channels).view(argument(node, "groups"), -1).t().reshape(-1)
            _select_instead(recording, node, node.args[0], 1, order)
    take_apart(recording)
    _fuse_permutations(recording)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _replace(recording: Recording, node: Node, new: Node) -> None:
    new.meta = dict(node.meta)
    recording.shapes[new.name] = recording.shapes[node.name]
    recording.dtypes[new.name] = recording.dtypes[node.name]
    if node.name in recording.values:
        recording.values[new.name] = recording.values[node.name]
    node.replace_all_uses_with(new)
    recording.graph.graph.erase_node(node)


def _explicit_sizes(recording: Recording, node: Node, name: str) -> None:
    graph = recording.graph.graph
    shape = recording.shapes[node.name]
    known = getattr(node.meta.get("val"), "shape", [None] * len(shape))
    target = aten.expand.default if name == "expand_as" else aten.reshape.default
    with graph.inserting_before(node):
        sizes: list[Any] = []
        for axis, size in enumerate(known):
            if isinstance(size, int):
                sizes.append(size)
            else:
                asked = graph.call_function(aten.sym_size.int, (node.args[1], axis))
                recording.values[asked.name] = shape[axis]
                sizes.append(asked)
        new = graph.call_function(target, (node.args[0], sizes))
    _replace(recording, node, new)


def _index_to_select(recording: Recording, node: Node) -> None:
    """Select along one axis by a constant: a vector or a table of positions, or a mask."""
    indices = argument(node, "indices")
    positions = [position for position, tensor in enumerate(indices) if tensor is not None]
    if len(positions) != 1 or indices[positions[0]].op != "get_attr":
        return
    axis, index = positions[0], indices[positions[0]]
    value = recording.values.get(index.name)
    if value is None or value.ndim == 0 or value.numel() == 0 or (value.ndim > 1 and value.dtype == torch.bool):
        return
    data = node.args[0]
    assert isinstance(data, Node)
    size = recording.shapes[recording.key(data)][axis]
    noted = getattr(data.meta.get("val"), "shape", {axis: size})[axis]
    if not isinstance(noted, int) and value.dtype != torch.bool and bool((value < 0).any()):
        return  # counted from the end of a batch, which may be of any size
    order = value.nonzero().view(-1) if value.dtype == torch.bool else value.reshape(-1).long() % size
    if value.ndim > 1:
        _table_to_select(recording, node, axis, order, value.shape)
    elif torch.equal(order, value):
        with recording.graph.graph.inserting_before(node):
            new = recording.graph.graph.call_function(aten.index_select.default, (data, axis, index))
        _replace(recording, node, new)
    else:
        _select_instead(recording, node, data, axis, order)


def _table_to_select(recording: Recording, node: Node, axis: int, order: torch.Tensor, shape: torch.Size) -> None:
    """Select by the table's entries in a row, and give the axis the shape of the table."""
    graph, whole = recording.graph, recording.shapes[node.name]
    with graph.graph.inserting_before(node):
        index = add_buffer(graph, graph.graph, "_order", order.clone())
        row = graph.graph.call_function(aten.index_select.default, (node.args[0], axis, index))
        new = graph.graph.call_function(aten.unflatten.int, (row, axis, list(shape)))
    recording.add_leaf(str(index.target))
    recording.values[index.name] = order
    row.meta = {name: value for name, value in node.meta.items() if name != "val"}
    recording.shapes[row.name] = (*whole[:axis], len(order), *whole[axis + len(shape) :])
    recording.dtypes[row.name] = recording.dtypes[node.name]
    _replace(recording, node, new)


def _select_instead(recording: Recording, node: Node, data: Node, axis: int, order: torch.Tensor) -> None:
    graph = recording.graph
    with graph.graph.inserting_before(node):
        index = add_buffer(graph, graph.graph, "_order", order.clone())
        new = graph.graph.call_function(aten.index_select.default, (data, axis, index))
    recording.add_leaf(str(index.target))
    recording.values[index.name] = order
    _replace(recording, node, new)


def _fuse_permutations(recording: Recording) -> None:
    for node in list(recording.graph.graph.nodes):
        if operator_name(node) in ("view", "reshape", "unflatten") and node.users and isinstance(node.args[0], Node):
            _fuse_from(recording, node)


def _fuse_from(recording: Recording, first: Node) -> None:
    """Replace the chain that begins at `first` if its net effect is a permutation of one axis."""
    source = first.args[0]
    assert isinstance(source, Node)
    key = recording.key(source)
    shape = recording.shapes.get(key)
    if shape is None:
        return
    chain = [first]
    while len(chain) < _LONGEST_CHAIN:
        last = chain[-1]
        if last is not first and recording.shapes[last.name] == shape:
            found = _permutation_of_one_axis(recording, source, chain, shape)
            if found is not None:
                _select_instead(recording, last, source, found[0], found[1])
                for node in reversed(chain[:-1]):
                    recording.graph.graph.erase_node(node)
                return
        if len(last.users) != 1:
            return
        following = next(iter(last.users))
        if operator_name(following) not in _MOVES or following.args[0] is not last:
            return
        chain.append(following)


def _permutation_of_one_axis(
    recording: Recording, source: Node, chain: list[Node], shape: tuple[int, ...]
) -> tuple[int, torch.Tensor] | None:
    positions = torch.arange(math.prod(shape)).view(shape)
    moved: dict[Node, torch.Tensor] = {source: positions}

    def known(used: Node) -> Any:
        return moved[used] if used in moved else recording.values[used.name]

    for node in chain:
        args, kwargs = map_arg(node.args, known), map_arg(node.kwargs, known)
        moved[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    result = moved[chain[-1]]
    if torch.equal(result, positions):
        return None
    for axis, size in enumerate(shape):
        line = tuple(slice(None) if other == axis else 0 for other in range(len(shape)))
        order = result[line] // math.prod(shape[axis + 1 :]) % size
        if torch.equal(order.sort().values, torch.arange(size)) and torch.equal(
            positions.index_select(axis, order), result
        ):
            return axis, order
    return None
