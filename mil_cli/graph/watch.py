"""Shows values inside a graph, as they are made, to those who look at them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from mil_cli.graph.nodes import get_attribute
from mil_cli.graph.program import set_out_spec

_OWNER = "watcher"


class _Look(nn.Module):
    def __init__(self, look: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.look = look

    def forward(self, value: Tensor) -> None:
        self.look(value)


def watched(graph: GraphModule, looks: Mapping[Node, Callable[[Tensor], None]]) -> GraphModule:
    """Return a graph module that shares the weights of another and shows some values; memory does not grow by it.

    It returns nothing, and computes nothing after the last of these values.

    Args:
        graph: The graph; it is not changed.
        looks: Node of `graph` -> what is called with its output each time.
    """
    names: dict[Node, Node] = {}
    copied = Graph()
    copied.graph_copy(graph.graph, names)
    copied.set_codegen(copy.copy(graph.graph._codegen))
    shown = {names[node] for node in looks}
    for node in reversed(list(copied.nodes)):
        if node in shown:
            break
        if node.op != "placeholder":
            copied.erase_node(node)
    copied.output(())
    attributes: dict[str, Any] = {
        str(node.target): get_attribute(graph, str(node.target)) for node in copied.find_nodes(op="get_attr")
    }
    for index, (node, look) in enumerate(looks.items()):
        target = f"{_OWNER}_{index}"
        attributes[target] = _Look(look)
        before = copied.find_nodes(op="placeholder")[-1] if node.op == "placeholder" else names[node]
        with copied.inserting_after(before):
            copied.call_module(target, (names[node],))
    watching = GraphModule(attributes, copied)
    set_out_spec(watching, pytree.tree_structure(()))
    return watching
