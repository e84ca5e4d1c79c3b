"""Normalisation: batch, instance, layer, RMS and group norm, and weight norm."""

from __future__ import annotations

from mil_cli.graph.coupling.table import Operation, Rules, UnsupportedForm, rules_for

_STATISTICS = "statistics are taken over the axis"

BATCH_NORMS = ("batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training")
"""Norms by statistics that are constants in evaluation."""


def batch_norm(operation: Operation) -> None:
    """Scale, shift and running statistics belong to the channels (axis 1); statistics of the batch are inexact."""
    data = operation.need("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        key = operation.key(name)
        if key is not None:
            operation.link(key, 0, data, 1)
    instance = operation.name == "instance_norm"
    stored = operation.key("running_mean") is not None
    own = bool(operation.argument("use_input_stats")) if instance else bool(operation.argument("training", False))
    if own or not stored:
        for axis in range(operation.rank(data)):
            if axis > 1 or (axis == 0 and not instance):
                operation.inexact(data, axis, _STATISTICS)
    for output in operation.outputs:
        if operation.rank(output) == operation.rank(data):
            operation.link_all(data, output)


def layer_norm(operation: Operation) -> None:
    """Statistics over the last axes; scale and shift belong to them."""
    data, output = operation.need("input"), operation.output
    rank, normalized = operation.rank(data), len(operation.argument("normalized_shape"))
    for name in ("weight", "bias"):
        key = operation.key(name)
        if key is not None:
            for axis in range(normalized):
                operation.link(key, axis, data, rank - normalized + axis)
    operation.inexact(data, range(rank - normalized, rank), _STATISTICS)
    operation.link_all(data, output)


def group_norm(operation: Operation) -> None:
    """Statistics over the channels of a group and space; whole groups can go exactly."""
    data, output = operation.need("input"), operation.output
    groups, channels = operation.value("num_groups"), operation.shape(data)[1]
    grouped = operation.virtual("groups", (groups, channels // groups))
    operation.regroup(data, [1], grouped, [0, 1])
    for name in ("weight", "bias"):
        key = operation.key(name)
        if key is not None:
            operation.link(key, 0, data, 1)
    operation.inexact(grouped, 1, _STATISTICS)
    operation.freeze(data, range(2, operation.rank(data)), "group norm takes statistics over space")
    operation.link_all(data, output)


def weight_norm(operation: Operation) -> None:
    """A direction v and its lengths g: rows correspond; columns may go, for the length is that of what is left."""
    direction, length, output = operation.need("v"), operation.need("g"), operation.output
    operation.link_all(direction, output)
    lengths = operation.shape(length) or (1,) * operation.rank(direction)  # one length of the whole weight has no axes
    for axis, size in enumerate(operation.shape(direction)):
        if lengths[axis] == size:
            operation.link(direction, axis, length, axis)
        else:
            operation.inexact(direction, axis, "the length of what is left")


def local_response_norm(operation: Operation) -> None:
    """Neighbouring channels are mixed."""
    raise UnsupportedForm("neighbouring channels are mixed")


RULES: Rules = {
    **rules_for(batch_norm, "instance_norm", *BATCH_NORMS),
    **rules_for(layer_norm, "layer_norm", "rms_norm", "_fused_rms_norm"),
    **rules_for(group_norm, "group_norm"),
    **rules_for(weight_norm, "_weight_norm"),
    **rules_for(local_response_norm, "local_response_norm"),
}
