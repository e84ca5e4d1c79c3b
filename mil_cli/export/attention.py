"""Brings attention into the form that torch's ONNX exporter can write: four axes, results in plain order of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mil_cli.graph.nodes import get_argument, set_argument

aten = torch.ops.aten

_AXES = 4


def rewrite_attention(program: ExportedProgram) -> None:
    """Rewrite every attention of a program, in place, without a change of what it computes."""
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        _give_four_axes(graph, node)
        _order(graph, node)
    graph.lint()
    program.graph_module.recompile()


def _order(graph: Graph, node: Node) -> None:
    """Copy a result into plain order of memory; in ONNX the copy is nothing.

    The exporter chooses views by how the fused kernel lays out its result, and only then takes attention apart into
    products that lay it out otherwise, where those views are not possible.
    """
    with graph.inserting_after(node):
        ordered = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    ordered.meta = dict(node.meta)
    node.replace_all_uses_with(ordered, delete_user_cb=lambda user: user is not ordered)


def _give_four_axes(graph: Graph, node: Node) -> None:
    """Join the leading axes of queries, keys and values that have more than four axes, or add those that are missing.

    Operands whose leading axes differ, and are to be broadcast, stay as they are.
    """
    operands = {name: get_argument(node, name) for name in ("query", "key", "value")}
    shapes = [tuple(operand.meta["val"].shape) for operand in operands.values()]
    rank = len(shapes[0])
    leading = shapes[0][: rank - 3]
    if rank == _AXES or any(len(shape) != rank or shape[: rank - 3] != leading for shape in shapes):
        return
    mask = get_argument(node, "attn_mask")
    whole = node.meta["val"]
    with graph.inserting_before(node):
        sizes = [_size(graph, operands["query"], axis) for axis in range(rank - 3)]
        for name, operand in operands.items():
            set_argument(node, name, _fewer(graph, operand, rank) if rank > _AXES else _more(graph, operand, rank))
        if mask is not None and rank > _AXES and mask.meta["val"].ndim >= _AXES:
            tail = [_size(graph, mask, axis) for axis in range(mask.meta["val"].ndim - 3, mask.meta["val"].ndim)]
            set_argument(
                node, "attn_mask", _fewer(graph, _call(graph, aten.expand.default, mask, [*sizes, *tail]), rank)
            )
    node.meta = {**node.meta, "val": _value(node)}
    users = list(node.users)
    with graph.inserting_before(node.next):
        if rank > _AXES:
            result = _call(graph, aten.unflatten.int, node, 0, sizes)
        else:
            result = node
            for _ in range(_AXES - rank):
                result = _call(graph, aten.squeeze.dim, result, 0)
    result.meta = {**node.meta, "val": whole}
    for user in users:
        user.replace_input_with(node, result)


def _fewer(graph: Graph, node: Node, rank: int) -> Node:
    return _call(graph, aten.flatten.using_ints, node, 0, rank - _AXES)


def _more(graph: Graph, node: Node, rank: int) -> Node:
    for _ in range(_AXES - rank):
        node = _call(graph, aten.unsqueeze.default, node, 0)
    return node


def _size(graph: Graph, node: Node, axis: int) -> int | Node:
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else _call(graph, aten.sym_size.int, node, axis)


def _call(graph: Graph, target: Callable[..., Any], *args: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = _value(node)
    return node


def _value(node: Node) -> Any:
    """Return what a call gives, as shapes."""
    assert callable(node.target)
    args, kwargs = map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
    return node.target(*args, **kwargs)
