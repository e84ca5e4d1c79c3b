"""Ops that act on each entry by itself, with broadcasting: every operand's axes are those of the result."""

from __future__ import annotations

import torch
from torch.fx import Node

from mil_cli.graph.coupling.table import Operation, Rules, UnsupportedForm, rules_for

_UNTAGGED = frozenset(
    [
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
        "native_dropout",
        "contiguous",
        "clone",
        "alias",
        "detach",
        "to",
        "real",
        "imag",
        "type_as",
        "_to_copy",
        "lift_fresh_copy",
        "lift_fresh",
        "copy",
        "masked_fill",
        "where",
        "clamp",
        "clamp_min",
        "clamp_max",
        "bernoulli",
        "rand_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "randn_like",
        "add",
        "sub",
        "mul",
        "div",
        "relu",
        "relu6",
        "silu",
        "gelu",
        "hardtanh",
        "fill",
        "zero",
        "float",
        "bool",
        "conj",
        "rsub",
        "requires_grad",
        "_conj",
        "complex",
        "polar",
        "log_sigmoid",
        "celu",
        "rrelu",
        "leaky_relu",
        "hardsigmoid",
        "hardswish",
        "square",
        "lerp",
        "addcmul",
        "addcdiv",
        "bitwise_not",
        "logical_not",
        "softplus",
        "mish",
        "elu",
        "selu",
        "tanh",
        "sigmoid",
        "threshold",
        "nan_to_num",
        "expand_as",
        "floor_divide",
        "true_divide",
        "remainder",
        "fmod",
        "pow",
        "clip",
        "__and__",
        "__or__",
        "__xor__",
        "multiply",
        "subtract",
        "divide",
        "negative",
        "absolute",
        "positive",
        "greater",
        "greater_equal",
        "less",
        "less_equal",
        "not_equal",
    ]
)
"""Ops that are pointwise but do not all carry the tag."""


def is_pointwise(node: Node, name: str) -> bool:
    """Return whether an op acts entry by entry: by its tag, by the list, or as the in-place form of one that does."""
    plain = name.rstrip("_") if not name.startswith("_") else name
    if name in _UNTAGGED or plain in _UNTAGGED:
        return True
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return True
    packet = getattr(torch.ops.aten, plain, None) if plain != name else None
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def pointwise(operation: Operation) -> None:
    """Relate every operand to the result, aligned at the right; an axis of size 1 that is broadcast carries nothing."""
    if not operation.outputs:
        return
    for output in operation.outputs:
        for key in operation.inputs:
            if operation.shape(key) != () and operation.shape(output) != ():
                operation.link_broadcast(key, output)


def prelu(operation: Operation) -> None:
    """Relate the slopes to the channels (axis 1)."""
    data, slopes = operation.need("self"), operation.need("weight")
    if operation.rank(slopes) == 1 and operation.shape(slopes)[0] > 1:
        operation.link(slopes, 0, data, 1)
    operation.link_all(data, operation.output)


def quantizer(operation: Operation) -> None:
    """Relate data to its quantized form, and per-channel scales and zero points to the axis that they belong to."""
    data, axis = operation.need("x"), operation.argument("axis")
    operation.link_all(data, operation.output)
    for key in (operation.need("scale"), operation.key("zero_point")):
        if key is None:
            continue
        if axis is not None and operation.rank(key) == 1 and operation.shape(key)[0] > 1:
            operation.link(key, 0, data, axis)
        elif operation.rank(key) == 1 and operation.shape(key)[0] > 1:
            raise UnsupportedForm("several scales without an axis")


def quantize_blocks(operation: Operation) -> None:
    """Relate a weight to its quantized form, and the rows of its scales to the axis of the weight's rows."""
    data, scale = operation.need("x"), operation.need("scale")
    if operation.shape(scale)[1] > 1:
        raise UnsupportedForm("several scales in a row")
    operation.link_all(data, operation.output)
    operation.link(scale, 0, data, operation.argument("axis"))


def quantize_dynamic(operation: Operation) -> None:
    """Relate data to its quantized form."""
    operation.link_all(operation.need("x"), operation.output)


RULES: Rules = {
    **rules_for(prelu, "prelu"),
    **rules_for(quantizer, "mil::quantize_affine", "mil::quantize_levels"),
    **rules_for(quantize_blocks, "mil::quantize_blocks"),
    **rules_for(quantize_dynamic, "mil::quantize_dynamic"),
}
