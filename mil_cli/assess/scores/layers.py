"""Which nodes of a graph are layers with a weight, and the parameter that the weight is made of."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node

from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name

_LAYERS = frozenset(
    {
        *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        "convolution",  # what they all are in decomposed graphs
    }
)


def weighted_layers(graph: GraphModule) -> dict[Node, nn.Parameter]:
    """Return the convolutions and linear layers of a graph in functional form, each with its weight.

    A weight that is computed (weight norm, weight standardisation, a quantizer) stands for the largest parameter that
    it is computed from. A layer whose weight another layer computes has none, and is left out.
    """
    found = {node: _weight(graph, node) for node in calls(graph) if op_name(node) in _LAYERS}
    return {node: weight for node, weight in found.items() if weight is not None}


def depending_on_inputs(graph: GraphModule) -> set[Node]:
    """Return the nodes that compute something from an input, be it only from its size."""
    found = set(graph.graph.find_nodes(op="placeholder"))
    for node in calls(graph):
        if any(used in found for used in node.all_input_nodes):
            found.add(node)
    return found


def _weight(graph: GraphModule, layer: Node) -> nn.Parameter | None:
    seen: set[Node] = set()
    pending = [get_argument(layer, "weight")]
    parameters: list[nn.Parameter] = []
    while pending:
        node = pending.pop()
        if node in seen or op_name(node) in _LAYERS:
            continue
        seen.add(node)
        value = get_attribute(graph, str(node.target)) if node.op == "get_attr" else None
        if isinstance(value, nn.Parameter) and value.is_floating_point():
            parameters.append(value)
        pending.extend(node.all_input_nodes)
    return max(parameters, key=lambda parameter: parameter.numel(), default=None)
