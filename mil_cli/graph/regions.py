"""Writes out the regions that the exporter wraps into calls: no-grad blocks and autocast, on or off.

Inside a wrapped region nothing could be counted, cut, switched or quantized. Without the wrapper a no-grad region
computes the same; its results are detached, so that no gradient flows into it either. Of autocast the casts are written
out: the exporter noted the type of every result.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from mil_cli.graph.nodes import get_attribute, meta_like, op_name

_CASTS = "mil_under_autocast"


@dataclass(frozen=True)
class _Region:
    """A wrapped region.

    Attributes:
        call: The node that runs it.
        body: The node of its graph.
        operands: What is handed to it.
        stops: Whether gradients stop at its results.
        casts: Whether it runs under autocast.
    """

    call: Node
    body: Node
    operands: tuple[Any, ...]
    stops: bool
    casts: bool


def inline_regions(graph: GraphModule) -> None:
    """Replace every such region of a graph by its own nodes, in place; regions in regions too."""
    changed = False
    while (found := _next_region(graph)) is not None:
        _inline(graph, found)
        changed = True
    if changed:
        drop_unread_graphs(graph)
        graph.graph.lint()
        graph.recompile()


def drop_unread_graphs(graph: GraphModule) -> None:
    """Take out of a graph module, in place, the graphs of regions that none of its nodes read any more."""
    read = tuple(f"{node.target}." for node in graph.graph.find_nodes(op="get_attr"))
    for name, child in list(graph.named_children()):
        if isinstance(child, GraphModule) and not any(target.startswith(f"{name}.") for target in read):
            delattr(graph, name)


def _next_region(graph: GraphModule) -> _Region | None:
    for node in graph.graph.nodes:
        if op_name(node) == "wrap_with_set_grad_enabled" and node.op == "call_function":
            return _Region(node, node.args[1], node.args[2:], stops=node.args[0] is False, casts=_CASTS in node.meta)
        if op_name(node) == "wrap_with_autocast" and node.op == "call_function":
            return _Region(node, node.args[4], node.args[5:], stops=False, casts=bool(node.args[2]))
    return None


def _inline(graph: GraphModule, region: _Region) -> None:
    call, body_node, operands = region.call, region.body, region.operands
    prefix = str(body_node.target)
    results: Any = None
    body: GraphModule = get_attribute(graph, prefix)
    inner: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "get_attr":
                inner[node] = graph.graph.get_attr(f"{prefix}.{node.target}")
            elif node.op == "call_function":
                inner[node] = graph.graph.node_copy(node, lambda used: inner[used])
                if region.casts and op_name(node) == "wrap_with_set_grad_enabled":
                    inner[node].meta[_CASTS] = True
                elif region.casts:
                    _write_casts(graph, inner[node])
        results = map_arg(body.graph.output_node().args[0], lambda used: inner[used])
        if region.stops:
            results = map_arg(results, lambda value: _detached(graph, value))
    for user in list(call.users):
        if user.target is operator.getitem:
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            graph.graph.erase_node(user)
    if call.users:
        call.replace_all_uses_with(results[0] if isinstance(results, tuple | list) else results)
    graph.graph.erase_node(call)
    if not body_node.users:
        graph.graph.erase_node(body_node)


def _write_casts(graph: GraphModule, node: Node) -> None:
    """Give a call operands of the type of its result, if autocast must have cast them."""
    wanted, given = _float_type(node), {_float_type(used) for used in node.all_input_nodes} - {None}
    if wanted is None or given <= {wanted} or op_name(node).startswith("wrap_with"):
        return
    first = _float_type(node.all_input_nodes[0])
    if op_name(node).endswith("_norm") and first == wanted:
        return  # norms take a scale of another type
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) and wanted in given and len(given) > 1:
        return  # the operator itself goes to the wider type
    with graph.graph.inserting_before(node):
        casts = {used: _cast(graph, used, wanted) for used in node.all_input_nodes if _float_type(used) is not None}
    node.args = map_arg(node.args, lambda used: casts.get(used, used))
    node.kwargs = map_arg(node.kwargs, lambda used: casts.get(used, used))


def _float_type(node: Node) -> torch.dtype | None:
    """Return the type of what a node gives, or of the first tensor that it gives, if it is a floating-point one."""
    value = node.meta.get("val")
    if node.op == "get_attr" and value is None and node.graph.owning_module is not None:
        value = get_attribute(node.graph.owning_module, str(node.target))
    if isinstance(value, tuple | list):
        value = next((part for part in value if isinstance(part, torch.Tensor)), None)
    return value.dtype if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _cast(graph: GraphModule, node: Node, wanted: torch.dtype) -> Node:
    if _float_type(node) == wanted:
        return node
    result = graph.graph.call_function(torch.ops.aten.to.dtype, (node, wanted))
    result.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    if isinstance(value := node.meta.get("val"), torch.Tensor):
        result.meta["val"] = value.to(wanted)
    return result


def _detached(graph: GraphModule, value: Node) -> Node:
    if not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    result = graph.graph.call_function(torch.ops.aten.detach.default, (value,))
    result.meta = meta_like(value)
    return result
