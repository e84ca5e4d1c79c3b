"""Reading ATen nodes by the schema names of their arguments, and adding constants to a graph."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.fx import Graph, Node

from mil_cli.graph.nodes import get_argument, namespace, op_name, schema_index


def operator_name(node: Node) -> str:
    """Return the bare name of what a node calls, with the namespace if that is not ATen: ``mil::quantize_affine``."""
    space = namespace(node)
    return op_name(node) if space in ("", "aten") else f"{space}::{op_name(node)}"


def has_argument(node: Node, name: str) -> bool:
    """Return whether the overload that `node` calls declares an argument of that name."""
    return schema_index(node, name) is not None


def argument(node: Node, name: str, default: Any = None) -> Any:
    """Return the value of an argument: as given, else the schema's default; `default` if the overload has none."""
    if not has_argument(node, name):
        return default
    value = get_argument(node, name)
    return default if value is None else value


def written_after(node: Node) -> bool:
    """Return whether memory that a view may share with others is written by an operator that comes after it."""
    first = node
    while _shares_memory(first):
        first = first.all_input_nodes[0]
    family, todo = {first}, [first]
    while todo:
        for user in todo.pop().users:
            if user not in family and (_shares_memory(user) or _writes(user)) and user.all_input_nodes[0] in family:
                family.add(user)
                todo.append(user)
    return any(_writes(member) and node < member for member in family)


def _shares_memory(node: Node) -> bool:
    """Return whether an operator gives a view of its first operand, or that operand itself."""
    schema = getattr(node.target, "_schema", None)
    if operator_name(node) == "getitem":
        return True
    return (
        schema is not None
        and bool(node.all_input_nodes)
        and any(result.alias_info is not None for result in schema.returns)
    ) or operator_name(node) in _PERHAPS_VIEWS


_PERHAPS_VIEWS = frozenset(("reshape", "contiguous", "flatten", "to", "unsafe_split", "unsafe_chunk"))
"""Operators that give their operand itself, or a view of it, where they need not copy."""


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


class Graphed(Protocol):
    """A module with a graph, whether or not the graph's code was generated."""

    graph: Graph

    def register_buffer(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a tensor under a name."""


def add_buffer(module: Graphed, graph: Graph, prefix: str, value: torch.Tensor) -> Node:
    """Register a constant under a new name that begins with `prefix`, and return a node that reads it."""
    number = 0
    while hasattr(module, f"{prefix}_{number}"):
        number += 1
    name = f"{prefix}_{number}"
    module.register_buffer(name, value)
    return graph.get_attr(name)
