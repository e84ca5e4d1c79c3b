"""Cuts out the part of a graph that makes one value from others, as a module of its own."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from mil_cli.graph.nodes import calls, get_attribute, op_name


@dataclass(frozen=True)
class Segment:
    """A part of a graph.

    Attributes:
        end: The node whose value it makes.
        inputs: The nodes whose values it is given: the entry, and what else is read that does not depend on it,
            such as masks and sizes; in order of execution.
        nodes: The nodes that it runs, constants included, in order of execution.
    """

    end: Node
    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]

    def module(self, graph: GraphModule) -> GraphModule:
        """Return a module that takes the values of `inputs`, in that order, and gives that of `end`.

        Its tensors share the memory of the graph's own, and are not trained.
        """
        part = Graph()
        copies: dict[Node, Node] = {node: part.placeholder(node.name) for node in self.inputs}
        attributes = {}
        for node in self.nodes:
            copies[node] = part.node_copy(node, lambda used: copies[used])
            if node.op == "get_attr":
                value = get_attribute(graph, str(node.target))
                attributes[str(node.target)] = value.detach() if isinstance(value, Tensor) else value
        part.output(copies[self.end])
        return GraphModule(attributes, part)


def segment(graph: GraphModule, entry: Node, end: Node) -> Segment:
    """Return the part of a graph that makes `end` from `entry`.

    It runs what lies between the two, and what depends on no input of the model; other values it is given.

    Raises:
        ValueError: `end` does not depend on `entry`.
    """
    behind, live = {entry}, set(graph.graph.find_nodes(op="placeholder"))
    for node in graph.graph.nodes:
        if any(used in behind for used in node.all_input_nodes):
            behind.add(node)
        if any(used in live for used in node.all_input_nodes):
            live.add(node)
    if end not in behind or end is entry:
        raise ValueError(f"{end.name} does not depend on {entry.name}")
    inside: set[Node] = set()
    given: set[Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node is entry or (node in live and node not in behind):
            given.add(node)
        elif node not in inside:
            inside.add(node)
            pending.extend(node.all_input_nodes)
    order = list(graph.graph.nodes)
    inputs = tuple(node for node in order if node in given)
    return Segment(end, inputs, tuple(node for node in order if node in inside))


def overwritten(graph: GraphModule) -> set[Node]:
    """Return the nodes whose values an operator in place changes after they were made, through whatever view.

    Such a value is not the same wherever it is read: a part of the graph that reads it cannot stand alone, and it
    cannot be rounded once for all its readers.
    """
    found: set[Node] = set()
    sharing: dict[Node, list[Node]] = {}
    for node in calls(graph):
        memory = _memory(node)
        if is_in_place(node):
            found.update(sharing.setdefault(memory, [memory]))
        sharing.setdefault(memory, [memory]).append(node)
    return found


def is_in_place(node: Node) -> bool:
    """Whether a call writes into its first operand."""
    name = op_name(node)
    return name.endswith("_") and not name.endswith("__")


def is_view(node: Node) -> bool:
    """Whether a call's result may lie where its first operand lies, as that of an operator in place does."""
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        return bool(arguments) and arguments[0].alias_info is not None
    return node.target is operator.getitem


def _memory(node: Node) -> Node:
    """Return the node in whose memory a value lies."""
    while node.args and is_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
