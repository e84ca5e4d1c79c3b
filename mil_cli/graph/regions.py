"""Writes out the regions that the exporter wraps into calls: no-grad blocks and switched-off autocast.

Inside a wrapped region nothing could be counted, cut, switched or quantized. Without the wrapper a no-grad region
computes the same; its results are detached, so that no gradient flows into it either.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from mil_cli.graph.nodes import get_attribute, op_name


def inline_regions(graph: GraphModule) -> None:
    """Replace every such region of a graph by its own nodes, in place; regions in regions too."""
    changed = False
    while (found := _next_region(graph)) is not None:
        _inline(graph, *found)
        changed = True
    if changed:
        read = tuple(f"{node.target}." for node in graph.graph.find_nodes(op="get_attr"))
        for name, child in list(graph.named_children()):
            if isinstance(child, GraphModule) and not any(target.startswith(f"{name}.") for target in read):
                delattr(graph, name)
        graph.graph.lint()
        graph.recompile()


def _next_region(graph: GraphModule) -> tuple[Node, Node, tuple[Any, ...], bool] | None:
    """Return the first region: its call, the node of its body, its operands, and whether gradients stop there."""
    for node in graph.graph.nodes:
        if op_name(node) == "wrap_with_set_grad_enabled" and node.op == "call_function":
            return node, node.args[1], node.args[2:], node.args[0] is False
        if op_name(node) == "wrap_with_autocast" and node.op == "call_function" and not node.args[2]:
            return node, node.args[4], node.args[5:], False
    return None


def _inline(graph: GraphModule, call: Node, body_node: Node, operands: tuple[Any, ...], stops: bool) -> None:
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
        results = map_arg(body.graph.output_node().args[0], lambda used: inner[used])
        if stops:
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


def _detached(graph: GraphModule, value: Node) -> Node:
    if not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    result = graph.graph.call_function(torch.ops.aten.detach.default, (value,))
    result.meta = {key: value.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in value.meta}
    return result
