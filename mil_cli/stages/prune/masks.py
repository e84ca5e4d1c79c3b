"""Masks on weights while they train: part of the graph, so that they are saved, resumed and averaged as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mil_cli.graph.nodes import calls, get_attribute, has_attribute, set_attribute

_OWNER = "masks"


def insert_masks(graph: GraphModule, masks: Mapping[str, Tensor]) -> dict[str, str]:
    """Let readers of weights read them times a mask, in place.

    Args:
        graph: The graph.
        masks: By name of a weight: which of its numbers stay, bool.

    Returns:
        By name of a weight: the name of its mask, a bool buffer (averages of weights leave those alone).
    """
    owner = _OWNER
    while has_attribute(graph, owner):
        owner += "_"
    paths = {}
    for number, (name, mask) in enumerate(masks.items()):
        weight = get_attribute(graph, name)
        path = paths[name] = f"{owner}.mask_{number}"
        set_attribute(graph, path, mask)
        for node in [node for node in graph.graph.find_nodes(op="get_attr") if _is(graph, node, weight)]:
            with graph.graph.inserting_after(node):
                factor = graph.graph.get_attr(path)
            factor.meta = {"val": mask}
            with graph.graph.inserting_after(factor):
                masked = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
            masked.meta = dict(node.meta)
            for user in [user for user in node.users if user is not masked]:
                user.replace_input_with(node, masked)
    graph.graph.lint()
    graph.recompile()
    return paths


def settle_masks(graph: GraphModule, paths: Mapping[str, str]) -> None:
    """Undo `insert_masks` in place; what a mask had at zero is zero in the weight."""
    for name, path in paths.items():
        weight, mask = get_attribute(graph, name), get_attribute(graph, path)
        for node in list(calls(graph)):
            source, factor = node.args[:2] if node.target is torch.ops.aten.mul.Tensor else (None, None)
            if isinstance(source, Node) and isinstance(factor, Node) and factor.target == path:
                node.replace_all_uses_with(source)
                graph.graph.erase_node(node)
                if not factor.users:
                    graph.graph.erase_node(factor)
        with torch.no_grad():
            weight.mul_(mask)
    for owner in {path.partition(".")[0] for path in paths.values()}:
        delattr(graph, owner)
    graph.graph.lint()
    graph.recompile()


def _is(graph: GraphModule, node: Node, weight: nn.Parameter) -> bool:
    return get_attribute(graph, str(node.target)) is weight
