"""The values that everything passes through on its way from input to output: ends of blocks, not what lies in them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node


def bottlenecks(graph: GraphModule) -> list[Node]:
    """Return the calls that every path from the first input to an output runs through, in order of execution.

    In terms of graphs: the dominators of the outputs. Inside a residual block there are none, since the shortcut goes
    around it; its end is one. Sizes that are read off a tensor are no path, and neither are weights; of inputs beside
    the first, such as a mask that every block reads, nothing is asked.

    Args:
        graph: A graph whose nodes know their values (``meta["val"]``).
    """
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    between = _between(graph)
    found, farthest = [], -1
    for node in sorted(between, key=order.__getitem__):
        # In this order a path avoids a node only by an edge that goes over it.
        if farthest <= order[node] and node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            found.append(node)
        farthest = max([farthest, *(order[user] for user in node.users if user in between)])
    return found


def _between(graph: GraphModule) -> set[Node]:
    """Return the nodes on paths from the first input that leads to an output."""
    sink = graph.graph.output_node()
    for source in graph.graph.find_nodes(op="placeholder"):
        ahead = _reached(source, "users")
        if sink in ahead:
            return ahead & _reached(sink, "all_input_nodes")
    return set()


def _reached(start: Node, edges: str) -> set[Node]:
    found, pending = {start}, [start]
    while pending:
        new = {node for node in getattr(pending.pop(), edges) if node not in found and _carries(node)}
        found |= new
        pending.extend(new)
    return found


def _carries(node: Node) -> bool:
    """Whether a node holds a tensor, or several."""
    value: Any = node.meta.get("val")
    return node.op == "output" or isinstance(value, Tensor | tuple | list)
