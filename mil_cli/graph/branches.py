"""Writes out both branches of `torch.cond` in one graph, and puts them back.

Written out, all nodes of both branches are the graph's own: they are related, cut, counted and compared like any
others, and the weights that were handed to a branch are read in place. The call stays under its name and chooses
between the results. Put back, what belongs to one branch runs only where that branch is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from mil_cli.graph.nodes import get_attribute, has_attribute, set_attribute
from mil_cli.graph.regions import drop_unread_graphs, inline_regions

COND = torch.ops.higher_order.cond
_PATH = "mil_branches"


def choose_branch(predicate: Any, when_true: Sequence[Any], when_false: Sequence[Any]) -> Sequence[Any]:
    """Return the results of one branch of two that have both run; where only shapes are known, those of the first."""
    shapes_only = isinstance(predicate, Tensor) and predicate.is_meta
    return when_true if shapes_only or bool(predicate) else when_false


def branch_path(node: Node) -> tuple[tuple[str, bool], ...]:
    """Return the branches that a written-out node is in, outermost first: the name of the call, and which one."""
    path: tuple[tuple[str, bool], ...] = node.meta.get(_PATH) or ()
    return path


def inline_branches(graph: GraphModule) -> None:
    """Write out both branches of every `torch.cond` of a graph, in place; branches in branches too."""
    if not graph.graph.find_nodes(op="call_function", target=COND):
        return
    for node in graph.graph.nodes:
        node.meta[_PATH] = ()
    while calls := graph.graph.find_nodes(op="call_function", target=COND):
        _inline(graph, calls[0])
    drop_unread_graphs(graph)
    graph.graph.lint()
    graph.recompile()


def restore_branches(graph: GraphModule) -> None:
    """Put the written-out branches of a graph back, in place; the graph's code is the caller's."""
    for name, body in outline_branches(graph.graph, lambda name: get_attribute(graph, name)).items():
        graph.add_module(name, body)
    drop_unread_graphs(graph)


def _inline(graph: GraphModule, call: Node) -> None:
    predicate, when_true, when_false, operands = call.args
    results = []
    for body_node, taken in ((when_true, True), (when_false, False)):
        body: GraphModule = get_attribute(graph, str(body_node.target))  # type: ignore[union-attr]
        inline_regions(body)
        inner: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))  # type: ignore[arg-type]
        with graph.graph.inserting_before(call):
            for node in body.graph.nodes:
                if node.op == "get_attr":
                    inner[node] = graph.graph.get_attr(_moved(body, str(node.target), graph))
                elif node.op == "call_function":
                    inner[node] = graph.graph.node_copy(node, lambda used: inner[used])  # noqa: B023
                else:
                    continue
                inner[node].meta[_PATH] = (*branch_path(call), (call.name, taken))
        results.append(map_arg(body.graph.output_node().args[0], lambda used: inner[used]))  # noqa: B023
    call.target = choose_branch
    call.args = (predicate, *results)
    for body_node in (when_true, when_false):
        if not body_node.users:  # type: ignore[union-attr]
            graph.graph.erase_node(body_node)  # type: ignore[arg-type]


def _moved(body: GraphModule, path: str, graph: GraphModule) -> str:
    """Give a graph what a branch's own graph holds under a path, constants or graphs, and return the name it got."""
    value = get_attribute(body, path)
    number = 0
    while has_attribute(graph, name := f"{path.replace('.', '_')}_{number}"):
        number += 1
    set_attribute(graph, name, value, persistent=False)
    return name


def outline_branches(graph: Graph, attribute: Callable[[str], Any]) -> dict[str, GraphModule]:
    """Put written-out branches back into graphs of their own, in place; the graph's code is the caller's.

    Nodes that were added since go into a branch if it alone reads them.

    Args:
        graph: A graph that `inline_branches` wrote, or a copy that was edited.
        attribute: Gives what the graph reads under a name.

    Returns:
        By name: the modules that the graph now reads besides.
    """
    made: dict[str, GraphModule] = {}

    def is_weight(node: Node) -> bool:
        name = str(node.target)
        return node.op == "get_attr" and name not in made and isinstance(attribute(name), Tensor)

    # Inner calls come before the outer ones.
    for call in graph.find_nodes(op="call_function", target=choose_branch):
        predicate, *results = call.args
        outside = [node for node in graph.nodes if is_weight(node) or node.op in ("placeholder", "output")]
        inside = [_nodes_of(call, which, {*outside, *_nodes_in((predicate, results[not which]))}) for which in (0, 1)]
        operands = dict.fromkeys(
            used
            for nodes, result in zip(inside, results, strict=True)
            for used in _read(nodes, result)
            if used not in nodes
        )
        bodies = []
        for nodes, result in zip(inside, results, strict=True):
            body = _graph_of(operands, nodes, result)
            held = {str(node.target) for node in body.find_nodes(op="get_attr")}
            root = {name: made.pop(name) if name in made else attribute(name) for name in held}
            bodies.append(GraphModule(root, body))
        with graph.inserting_before(call):
            readers = [graph.create_node("get_attr", f"mil_{call.name}_{which}") for which in ("true", "false")]
        made.update({str(reader.target): body for reader, body in zip(readers, bodies, strict=True)})
        call.target = COND
        call.args = (predicate, *readers, tuple(operands))
        for node in (*reversed(inside[0]), *reversed(inside[1])):
            graph.erase_node(node)
    return made


def _nodes_of(call: Node, which: int, outside: set[Node]) -> dict[Node, None]:
    """Return the nodes that run for one branch of a call alone, in order of execution.

    Args:
        call: The choice.
        which: 0 for the branch of a true predicate, 1 for the other.
        outside: Nodes that are not to be moved: a branch is handed its weights.
    """
    path = (*branch_path(call), (call.name, which == 0))
    inside: dict[Node, None] = {}
    for node in reversed(call.graph.nodes):
        added = _PATH not in node.meta
        mine = bool(node.users) if added else branch_path(node) == path
        if mine and node not in outside and all(user in inside or user is call for user in node.users):
            inside[node] = None
    return dict.fromkeys(reversed(inside))


def _read(nodes: Iterable[Node], result: Any) -> list[Node]:
    return [*(used for node in nodes for used in node.all_input_nodes), *_nodes_in(result)]


def _nodes_in(value: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(value, found.append)
    return found


def _graph_of(operands: Iterable[Node], nodes: Iterable[Node], result: Any) -> Graph:
    body = Graph()
    inner: dict[Node, Node] = {}
    for operand in operands:
        inner[operand] = body.placeholder(operand.name)
        inner[operand].meta = {key: value for key, value in operand.meta.items() if key != _PATH}
    for node in nodes:
        inner[node] = body.node_copy(node, inner.__getitem__)
        inner[node].meta.pop(_PATH, None)
    body.output(map_arg(result, inner.__getitem__))
    return body
