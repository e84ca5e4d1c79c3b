"""What the methods share that train a model with its quantizers in place, batch norms still alive.

Quantizers must go where they belong once the batch norms are folded into the layers before them: on a layer's weight,
and on the output of its batch norm.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from torch.fx import GraphModule, Node

from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.mode import record_mode
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import annotate, calls, get_argument, op_name, read_annotation
from mil_cli.stages.quantize.functional import make_functional
from mil_cli.stages.quantize.placement import Layer, Narrow, Placement, Policy, place_any


def place_unfolded(
    model: Model,
    *,
    policy: Literal["auto"] | Policy,
    skip: Sequence[str],
    narrow: Narrow | None,
    silent: Collection[Node] = (),
) -> Placement:
    """Decide where quantizers go on a model whose batch norms will be folded later.

    Args:
        model: In evaluation mode; its in-place operators are replaced.
        policy: The policy; ``auto`` goes by the graph.
        skip: Patterns of layers to leave float.
        narrow: Says which layers read fewer bits than the rest of the graph has; None: no layer does.
        silent: Values of `model` of which nothing but zeros was seen; they and their readers stay float.

    Returns:
        The placement that the folded model would get, on the nodes of `model`; the value of a layer that a batch norm
        is folded into is that of the batch norm.

    Raises:
        StageError: No layer is left to quantize, or a pattern of `skip` fits none.
    """
    folded = fold_batch_norm(model)
    make_functional(folded.graph)
    make_functional(model.graph)
    here = {node.name: node for node in model.graph.graph.nodes}
    remaining = {node.name for node in folded.graph.graph.nodes}

    def value(node: Node) -> Node:
        found: Node = here[node.name]
        return next((user for user in found.users if user.name not in remaining), found)

    unheard = {node for node in folded.graph.graph.nodes if node.name in here and value(node) in silent}
    chosen = place_any(folded.graph, policy=policy, skip=skip, narrow=narrow, silent=unheard)

    def layer(old: Layer) -> Layer:
        bias = None if old.bias is None else here.get(old.bias.name)
        node, weight = here[old.node.name], here[old.weight.name]
        return Layer(node, old.name, value(old.source), weight, old.axis, bias, old.edge)

    return Placement(
        policy=chosen.policy,
        layers=[layer(old) for old in chosen.layers],
        owned=[value(node) for node in chosen.owned],
        shared={value(node): value(root) for node, root in chosen.shared.items()},
        exclusive={value(node) for node in chosen.exclusive},
        readers={value(node): {here[user.name] for user in users} for node, users in chosen.readers.items()},
        edges={value(node) for node in chosen.edges},
        narrow={value(node): {here[user.name] for user in users} for node, users in chosen.narrow.items()},
        kept_float=chosen.kept_float,
        names=chosen.names,
    )


def freeze_norms(graph: GraphModule) -> dict[str, Any]:
    """Let batch norms use and keep their running statistics in training too, in place; those without any stay.

    Args:
        graph: A graph in evaluation mode.

    Returns:
        What `release_norms` needs to undo it.
    """
    before: dict[str, Any] = {}
    for node in calls(graph):
        if op_name(node) == "batch_norm" and not get_argument(node, "training"):
            before[node.name] = read_annotation(node, "mode")
            record_mode(node, "training", evaluation=False, training=False)
    return before


def release_norms(graph: GraphModule, before: dict[str, Any]) -> None:
    """Undo `freeze_norms` on a graph in evaluation mode that has the same nodes."""
    for node in calls(graph):
        if node.name in before:
            annotate(node, "mode", before[node.name])
