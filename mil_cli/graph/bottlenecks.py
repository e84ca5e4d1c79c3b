"""The values that everything passes through on its way from input to output: ends of blocks, not what lies in them."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node


def bottlenecks(graph: GraphModule) -> list[Node]:
    """Return the calls that every path from the first input to the first output runs through, in order of execution.

    In terms of graphs: the dominators of the output. Inside a residual block there are none, since the shortcut goes
    around it; its end is one. Sizes that are read off a tensor are no path, and neither are weights. Of further inputs
    and outputs nothing is asked: masks that every block reads, states that every block leaves. If the first does not
    lead to the first, the next ones count.

    Args:
        graph: A graph whose nodes know their values (``meta["val"]``).
    """
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    between = on_the_way(graph)
    found, farthest = [], -1
    for node in sorted(between, key=order.__getitem__):
        # In this order a path avoids a node only by an edge that goes over it.
        if farthest <= order[node] and node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            found.append(node)
        farthest = max([farthest, *(order[user] for user in node.users if user in between)])
    return found


def on_the_way(graph: GraphModule) -> set[Node]:
    """Return the nodes on paths from the first input that leads to an output, to the first output that it leads to."""
    for source in graph.graph.find_nodes(op="placeholder"):
        ahead = _reached(source, "users")
        for sink in graph.graph.output_node().all_input_nodes:
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
    return isinstance(node.meta.get("val"), Tensor | tuple | list)
