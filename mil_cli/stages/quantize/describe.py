"""Which bits the layers of a model have, or would have: what ``mil inspect`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch.fx import GraphModule, Node

from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.functional import make_functional
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.stages.quantize.placement import choose_policy, place
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.settle import fold_weights

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.quantize.settings import Rules


@dataclass
class LayerBits:
    """Bits of layers.

    Attributes:
        bits: Node name -> bits of its weight, and of the activation that it reads; None: float, or none.
        kept_float: Layer name -> why it stays float.
    """

    bits: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    kept_float: dict[str, str] = field(default_factory=dict)


def planned_bits(model: Model, rules: Rules, skip: Sequence[str] = (), *, trained: bool = False) -> LayerBits:
    """Return what quantization would give the layers of a float model, before it has seen any data.

    Args:
        model: The model; not changed.
        rules: Settings and device.
        skip: Patterns of layers to leave float.
        trained: Whether the method trains with quantizers in place: what computes weights stays in the graph then.

    Raises:
        StageError: A pattern fits no layer.
    """
    folded = fold_batch_norm(model) if trained else fold_weights(model)
    make_functional(folded.graph)
    policy = choose_policy(folded.graph) if rules.policy == "auto" else rules.policy
    placement = place(folded.graph, policy=policy, skip=skip, narrow=rules.narrow, tables=rules.tables)
    rules.check_used(placement)
    found = LayerBits(kept_float=placement.kept_float)
    for layer in placement.layers:
        if layer.looks_up:
            found.bits[layer.node.name] = rules.weights(layer).bits, None
            continue
        narrow = layer.node in placement.narrow.get(layer.source, ())
        value = layer.source if narrow else placement.owner(layer.source)
        read = rules.values(placement, value, narrow=narrow)
        found.bits[layer.node.name] = rules.weights(layer).bits, read.bits
    return found


def present_bits(model: Model) -> LayerBits:
    """Return which bits the layers of a quantized model have; none if it has no quantizers."""
    found = LayerBits()
    for node in calls(model.graph):
        codes = [value for source in node.all_input_nodes if (value := _codes(model.graph, source)) is not None]
        weight = [value for value in codes if value[1]]
        read = [value for value in codes if not value[1]]
        if weight:
            found.bits[node.name] = weight[0][0], read[0][0] if read else None
    return found


def _codes(graph: GraphModule, node: Node) -> tuple[int, bool] | None:
    """Return the bits of a quantizer, and whether it is that of a weight; None if it is no quantizer."""
    if op_name(node) == "quantize_levels":
        levels = get_attribute(graph, str(get_argument(node, "levels").target))
        return (len(levels) - 1).bit_length(), get_argument(node, "x").op == "get_attr"
    if op_name(node) == "quantize_dynamic":
        return 8, False
    if op_name(node) not in ("quantize_affine", "quantize_blocks"):
        return None
    codes = CodeRange(get_argument(node, "quant_min"), get_argument(node, "quant_max"))
    return codes.bits, get_argument(node, "x").op == "get_attr"
