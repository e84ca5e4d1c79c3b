"""Replaces in-place operators of a graph by functional ones, so that a value is the same wherever it is read."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from mil_cli.graph.nodes import calls, op_name

_VIEWS = frozenset(
    {
        *("view", "reshape", "flatten", "permute", "transpose", "t", "select", "slice", "squeeze", "unsqueeze"),
        *(
            "expand",
            "unflatten",
            "narrow",
            "chunk",
            "split",
            "split_with_sizes",
            "unbind",
            "getitem",
            "detach",
            "alias",
        ),
        *("view_as", "movedim", "contiguous"),
    }
)


def make_functional(graph: GraphModule) -> None:
    """Replace in-place operators in place where that cannot change a result; the rest stay as they are.

    ``relu_(x)`` becomes ``relu(x)``, and whoever read ``x`` afterwards reads the result. An operator that writes into a
    view, or whose target somebody else views, is left alone.
    """
    position = {node: index for index, node in enumerate(graph.graph.nodes)}
    for node in list(calls(graph)):
        functional = _functional_target(node)
        target = node.args[0] if node.args else None
        if functional is None or not isinstance(target, Node) or _is_viewed(target):
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
    name = op_name(node)
    if not isinstance(target, torch._ops.OpOverload) or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None)
    functional = getattr(packet, target._overloadname, None)
    if not isinstance(functional, torch._ops.OpOverload):
        return None
    names = [argument.name for argument in target._schema.arguments]
    same = names == [argument.name for argument in functional._schema.arguments]
    return functional if same and not functional._schema.is_mutable else None


def _is_viewed(node: Node) -> bool:
    return node.op != "call_function" or op_name(node) in _VIEWS or any(op_name(user) in _VIEWS for user in node.users)
