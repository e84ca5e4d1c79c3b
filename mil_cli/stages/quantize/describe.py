"""Which bits the layers of a model have, or would have: what ``mil inspect`` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch.fx import GraphModule, Node

from mil_cli.graph.functional import make_functional
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name
from mil_cli.ops import QUANTIZERS
from mil_cli.stages.quantize.passing import after_rectifier
from mil_cli.stages.quantize.placement import choose_policy, is_join, place
from mil_cli.stages.quantize.ranges import CodeRange, weight_codes
from mil_cli.stages.quantize.settle import fold_weights

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.quantize.placement import Placement
    from mil_cli.stages.quantize.settings import Rules


@dataclass
class LayerBits:
    """Bits of layers.

    Attributes:
        bits: Node name -> bits of its weight, and of the activation that it reads; None: float, or none.
        kept_float: Layer name -> why it stays float.
        form: What holds for all of them: the policy, signs and ranges of codes, what is quantized beside layers.
    """

    bits: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    kept_float: dict[str, str] = field(default_factory=dict)
    form: list[str] = field(default_factory=list)


def planned_bits(
    model: Model, rules: Rules, skip: Sequence[str] = (), *, fold: Callable[[Model], Model] = fold_weights
) -> LayerBits:
    """Return what quantization would give the layers of a float model, before it has seen any data.

    Args:
        model: The model; not changed.
        rules: Settings and device.
        skip: Patterns of layers to leave float.
        fold: Folds the batch norms, as the method's settings do.

    Raises:
        StageError: A pattern fits no layer.
    """
    folded = fold(model)
    make_functional(folded.graph)
    policy = choose_policy(folded.graph) if rules.policy == "auto" else rules.policy
    placement = place(folded.graph, policy=policy, skip=skip, narrow=rules.narrow, never=rules.never)
    rules.check_used(placement)
    found = LayerBits(kept_float=placement.kept_float, form=_planned_form(placement, rules, folded.graph))
    for layer in placement.layers:
        if layer.looks_up:
            found.bits[layer.node.name] = rules.weights(layer).bits, None
            continue
        narrow = layer.node in placement.narrow.get(layer.source, ())
        value = layer.source if narrow else placement.owner(layer.source)
        read = rules.values(placement, value, narrow=narrow)
        found.bits[layer.node.name] = rules.weights(layer).bits, read.bits
    return found


def _planned_form(placement: Placement, rules: Rules, graph: GraphModule) -> list[str]:
    """Return what a placement and its rules say of all layers, in sentences."""
    joins = [node for node in calls(graph) if is_join(node) and after_rectifier(node) in placement.exclusive]
    scales = "a scale for each output channel" if rules.per_channel else "one scale for a whole weight"
    return [
        f"placed by the policy {placement.policy}",
        *_codes_told({"int8" if rules.signed else "uint8"}, {weight_codes(8, reduce_range=rules.reduce_range)}),
        f"{scales}; at least {rules.edge_bits} bits next to inputs and outputs",
        *_joins_told(joins),
    ]


def _codes_told(activations: Collection[str], weights: Collection[CodeRange]) -> list[str]:
    """Return a sentence on the signs of activations, and the codes of weights of 8 bits."""
    told = [f"activations {' and '.join(sorted(activations))}"] if activations else []
    for codes in sorted(weights, key=lambda codes: codes.quant_max):
        reduced = ", a reduced range" if codes == weight_codes(8, reduce_range=True) else ""
        told.append(f"weights of 8 bits in [{codes.quant_min}, {codes.quant_max}]{reduced}")
    return ["; ".join(told)] if told else []


def _joins_told(joins: Sequence[Node]) -> list[str]:
    """Return a sentence on operators without weights that compute with integers."""
    counts = Counter(map(op_name, joins))
    told = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return [f"with integers between layers: {told}"] if counts else []


def present_bits(model: Model) -> LayerBits:
    """Return which bits the layers of a quantized model have; none if it has no quantizers."""
    found = LayerBits()
    for node in calls(model.graph):
        codes = [value for source in node.all_input_nodes if (value := _codes(model.graph, source)) is not None]
        weight = [value for value in codes if value[1]]
        read = [value for value in codes if not value[1]]
        if weight:
            found.bits[node.name] = weight[0][0], read[0][0] if read else None
    found.form.extend(_present_form(model.graph))
    return found


def _present_form(graph: GraphModule) -> list[str]:
    """Return what holds for the quantizers of a graph, in sentences."""
    affine = [node for node in calls(graph) if op_name(node) == "quantize_affine"]
    codes = [(CodeRange(get_argument(node, "quant_min"), get_argument(node, "quant_max")), node) for node in affine]
    reads = {"int8" if each.quant_min < 0 else "uint8" for each, node in codes if not _of_weight(node)}
    weights = {each for each, node in codes if _of_weight(node) and each.bits == 8}
    joins = [node for node in calls(graph) if is_join(node) and {*map(op_name, node.all_input_nodes)} <= QUANTIZERS]
    return [*_codes_told(reads, weights), *_joins_told([node for node in joins if node.all_input_nodes])]


def _of_weight(quantizer: Node) -> bool:
    return bool(get_argument(quantizer, "x").op == "get_attr")


def _codes(graph: GraphModule, node: Node) -> tuple[int, bool] | None:
    """Return the bits of a quantizer, and whether it is that of a weight; None if it is no quantizer."""
    if op_name(node) == "quantize_levels":
        levels = get_attribute(graph, str(get_argument(node, "levels").target))
        return (len(levels) - 1).bit_length(), _of_weight(node)
    if op_name(node) == "quantize_dynamic":
        return 8, False
    if op_name(node) not in ("quantize_affine", "quantize_blocks"):
        return None
    codes = CodeRange(get_argument(node, "quant_min"), get_argument(node, "quant_max"))
    return codes.bits, _of_weight(node)
