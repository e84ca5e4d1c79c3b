"""What must stay positive while quantizers train: their scales, and the gammas of batch norms that are folded later.

A gamma below 0 turns the codes of its channel around when it is folded, and codes that reach further below 0 than above
cannot be turned: 2 bits hold -2, -1, 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mil_cli.graph.fold import foldable_norms, per_output, reads_alone
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name, set_attribute
from mil_cli.ops import QUANTIZERS
from mil_cli.ops.learned_scale import learned_scale


def mirror_channels(model: Model, layers: Iterable[Node]) -> tuple[list[str], set[Node]]:
    """Turn the channels of layers around that a gamma below 0 follows, in place; the outputs stay the same.

    Args:
        model: The model.
        layers: Its layers whose codes must not be turned around by folding.

    Returns:
        The names of the gammas that are trained, none of which is below 0 now and which must stay so; and the layers
        that folding could turn around nevertheless: several layers or norms share a gamma, or norms follow each other.
    """
    graph, gammas, left = model.graph, [], set()
    norms = dict(foldable_norms(graph))
    for layer in layers:
        if layer not in norms:
            continue
        norm = norms[layer]
        gamma, mean = get_argument(norm, "weight"), get_argument(norm, "running_mean")
        if any(op_name(user) == "batch_norm" for user in norm.users):
            left.add(layer)
        elif gamma is None:
            continue
        elif reads_alone(graph, gamma, norm) and reads_alone(graph, mean, norm):
            _mirror(graph, layer, gamma, mean)
            value = get_attribute(graph, str(gamma.target))
            if isinstance(value, nn.Parameter) and value.requires_grad:
                gammas.append(str(gamma.target))
        else:
            left.add(layer)
    return gammas, left


def _mirror(graph: GraphModule, layer: Node, gamma: Node, mean: Node) -> None:
    sign = torch.where(get_attribute(graph, str(gamma.target)).detach() < 0, -1.0, 1.0)
    weight, bias = get_argument(layer, "weight"), get_argument(layer, "bias")
    for source in (gamma, mean, *([] if bias is None else [bias])):
        _multiply(get_attribute(graph, str(source.target)), sign)
    values = get_attribute(graph, str(weight.target))
    _multiply(values, per_output(layer, values, sign))


def _multiply(value: Tensor, sign: Tensor) -> None:
    with torch.no_grad():
        value.mul_(sign.to(value.dtype))


def keep_positive(graph: GraphModule, factors: Mapping[str, float]) -> None:
    """Make attributes trainable that are read by their magnitude, in place: `mil_cli.ops.learned_scale`.

    Args:
        graph: The graph.
        factors: Name of an attribute -> the factor on its gradient.
    """
    for name, factor in factors.items():
        if not isinstance(get_attribute(graph, name), nn.Parameter):
            set_attribute(graph, name, nn.Parameter(get_attribute(graph, name)))
        for node in graph.graph.find_nodes(op="get_attr"):
            if node.target == name:
                with graph.graph.inserting_after(node):
                    learned = graph.graph.call_function(torch.ops.mil.learned_scale.default, (node, factor))
                learned.meta = {key: node.meta[key] for key in ("val",) if key in node.meta}
                node.replace_all_uses_with(learned, delete_user_cb=lambda user, own=learned: user is not own)
    graph.graph.lint()
    graph.recompile()


def settle(graph: GraphModule) -> None:
    """Undo `keep_positive`, in place: the attributes are positive, and the scales of quantizers are buffers again."""
    for node in list(calls(graph)):
        if op_name(node) == "learned_scale":
            source, readers = get_argument(node, "scale"), list(node.users)
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
            value: Tensor = get_attribute(graph, str(source.target))
            settled = learned_scale(value.detach(), 1.0)
            if any(op_name(reader) in QUANTIZERS for reader in readers):
                set_attribute(graph, str(source.target), settled)
            else:
                set_attribute(graph, str(source.target), nn.Parameter(settled, requires_grad=value.requires_grad))
    graph.graph.lint()
    graph.recompile()
