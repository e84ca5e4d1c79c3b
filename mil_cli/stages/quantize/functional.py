"""Replaces in-place operators of a graph by functional ones, so that a value is the same wherever it is read."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from mil_cli.graph.nodes import calls, op_name
from mil_cli.graph.segment import is_in_place, is_view


def make_functional(graph: GraphModule) -> None:
    """Replace in-place operators in place where that cannot change a result; the rest stay as they are.

    ``relu_(x)`` becomes ``relu(x)``, and whoever read ``x`` afterwards reads the result. An operator that writes into a
    view, or whose target somebody else views, is left alone.
    """
    position = {node: index for index, node in enumerate(graph.graph.nodes)}
    for node in list(calls(graph)):
        functional = _functional_target(node)
        target = node.args[0] if node.args else None
        if functional is None or not isinstance(target, Node) or target.op != "call_function" or is_view(target):
            continue
        # Of the operators in place that read the target, those before this one are functional already, if they can be.
        views = [user for user in target.users if is_view(user)]
        if any(not is_in_place(user) or position[user] < position[node] for user in views):
            continue
        node.target = functional
        later = [user for user in target.users if position[user] > position[node]]
        for user in later:
            user.replace_input_with(target, node)
    graph.graph.lint()
    graph.recompile()


def _functional_target(node: Node) -> torch._ops.OpOverload | None:
    """Return the functional overload with the same arguments as the in-place one that `node` calls, or None."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not is_in_place(node):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), op_name(node)[:-1], None)
    functional = getattr(packet, target._overloadname, None)
    if not isinstance(functional, torch._ops.OpOverload):
        return None
    names = [argument.name for argument in target._schema.arguments]
    same = names == [argument.name for argument in functional._schema.arguments]
    return functional if same and not functional._schema.is_mutable else None
