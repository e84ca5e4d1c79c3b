"""Convolutions and transposed convolutions of any rank, with any number of groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mil_cli.graph.coupling.record import Key
from mil_cli.graph.coupling.table import Operation, Rules, UnsupportedForm, rules_for


def _per_axis(value: object, count: int, default: int) -> list[int] | None:
    """Return one number per spatial axis; None for a padding given by a word."""
    if isinstance(value, str):
        return [0] * count if value == "valid" else None
    if isinstance(value, int):
        return [value] * count
    if isinstance(value, Sequence) and value:
        return [int(number) for number in value] * (count // len(value))
    return [default] * count


def convolution(operation: Operation) -> None:
    """x(N, I, *S) W(O, I/g, *K) b(O) -> (N, O, *S'); transposed: W(I, O/g, *K).

    With groups, channels are (group, channel in group): the group axes of input, weight and output correspond, and
    the channels of one group are those of every other. Depthwise convolution is the case of one channel a group.
    """
    data, weight, output = operation.need("input"), operation.need("weight"), operation.output
    transposed = "transpose" in operation.name or bool(operation.argument("transposed", False))
    groups = operation.value("groups", 1)
    spatial = operation.rank(weight) - 2
    channel = operation.rank(data) - spatial - 1
    if spatial < 1 or channel < 0:
        raise UnsupportedForm("the shapes are not those of a convolution")
    for axis in range(channel):
        operation.link(data, axis, output, axis)
    _spatial(operation, data, weight, output, channel, transposed=transposed)
    bias = operation.key("bias")
    if bias is not None:
        operation.link(bias, 0, output, channel)
    if groups == 1:
        operation.link(data, channel, weight, 0 if transposed else 1)
        operation.link(weight, 1 if transposed else 0, output, channel)
        return
    inputs, outputs = operation.shape(data)[channel], operation.shape(output)[channel]
    grouped_in = operation.virtual("input", (groups, inputs // groups))
    grouped_out = operation.virtual("output", (groups, outputs // groups))
    operation.regroup(data, [channel], grouped_in, [0, 1])
    operation.regroup(output, [channel], grouped_out, [0, 1])
    operation.link(grouped_in, 0, grouped_out, 0)
    whole, part = (grouped_in, grouped_out) if transposed else (grouped_out, grouped_in)
    grouped_weight = operation.virtual("weight", operation.shape(whole))
    operation.regroup(weight, [0], grouped_weight, [0, 1])
    operation.link(grouped_weight, 0, whole, 0)
    operation.link(grouped_weight, 1, whole, 1)
    operation.link(part, 1, weight, 1)
    # Follows from the links above; said at once, it tells which rows of the weight read which group's channels.
    rows = np.arange(operation.shape(weight)[0])
    operation.link(part, 0, weight, 0, rows // (len(rows) // groups), rows, one_way=True)


def _spatial(operation: Operation, data: Key, weight: Key, output: Key, channel: int, *, transposed: bool) -> None:
    spatial = operation.rank(weight) - 2
    strides = _per_axis(operation.argument("stride", 1), spatial, 1) or [1] * spatial
    padding = _per_axis(operation.argument("padding", 0), spatial, 0) or [1] * spatial
    for number in range(spatial):
        axis = channel + 1 + number
        window = operation.shape(weight)[2 + number]
        same = operation.shape(data)[axis] == operation.shape(output)[axis]
        if window == 1 and strides[number] == 1 and (padding[number] == 0 or same) and same and not transposed:
            operation.link(data, axis, output, axis)  # a window of one is pointwise along this axis
        else:
            operation.freeze(data, axis, "a convolution slides over the axis")
            operation.freeze(output, axis, "a convolution slides over the axis")
        operation.freeze(weight, 2 + number, "the convolution's window")


NAMES = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convolution",
)

RULES: Rules = rules_for(convolution, *NAMES)
