"""Reductions, softmax, sorting: ops that mix the entries of an axis."""

from __future__ import annotations

import numpy as np

from mil_cli.graph.coupling.relations.pointwise import pointwise
from mil_cli.graph.coupling.table import Operation, Rules, UnsupportedForm, rules_for

SUMS = ("sum", "linalg_vector_norm", "norm", "frobenius_norm", "nansum", "count_nonzero")
"""Reductions to which an entry of zero adds nothing: exact once removed entries are zero."""

STATISTICS = (
    "mean",
    "amax",
    "amin",
    "aminmax",
    "var",
    "std",
    "prod",
    "max",
    "min",
    "logsumexp",
    "any",
    "all",
    "argmax",
    "argmin",
    "var_mean",
    "std_mean",
    "median",
    "nanmedian",
    "nanmean",
    "mode",
    "kthvalue",
)

_WITHOUT_POSITIONS = ("aminmax", "var_mean", "std_mean")
"""Reductions that give several tensors of which none holds positions."""


def reduction(operation: Operation) -> None:
    """Relate the axes that are not reduced."""
    data = operation.input
    rank = operation.rank(data)
    if operation.has("other"):
        pointwise(operation)  # the elementwise form of max and min
        return
    if len(operation.inputs) > 1:
        raise UnsupportedForm("depends on several tensors")
    given = operation.value("dim")
    if given is None or given == []:
        reduced = set(range(rank))
    else:
        reduced = {operation.axis(data, axis) for axis in ([given] if isinstance(given, int) else given)}
    for output in operation.outputs:
        kept = operation.rank(output) == rank
        target = 0
        for axis in range(rank):
            if axis in reduced:
                target += kept
            else:
                operation.link(data, axis, output, target)
                target += 1
    if operation.name not in SUMS or not _adds_nothing_for_zero(operation):
        operation.inexact(data, reduced, f"{operation.name} over the axis")
    several = len(operation.outputs) > 1 and operation.name not in _WITHOUT_POSITIONS
    if several or operation.name in ("argmax", "argmin"):
        operation.freeze(data, reduced, f"{operation.name} gives positions on the axis")


def _adds_nothing_for_zero(operation: Operation) -> bool:
    """Whether a sum, or a norm of this order, is the same without an entry of zero: not a norm of negative order."""
    order = operation.value("ord" if operation.has("ord") else "p", 2)
    return not isinstance(order, int | float) or order >= 0


def mixing(operation: Operation) -> None:
    """Freeze the axis along which entries are compared, normalised or accumulated; relate the others."""
    data = operation.input
    axis = operation.axis(data, operation.value("dim", -1))
    for key in [*operation.inputs, *operation.outputs]:
        operation.freeze(key, axis, f"{operation.name} over the axis")
    for output in operation.outputs:
        for key in operation.inputs:  # differences take what stands before and behind as tensors of their own
            operation.link_all(key, output, but=(axis,))


def softmax(operation: Operation) -> None:
    """Relate all axes; what is left of the normalised one shares the whole."""
    data, output = operation.input, operation.output
    operation.inexact(data, operation.value("dim", -1), f"{operation.name} over the axis")
    operation.link_all(data, output)


def likeness(operation: Operation) -> None:
    """Contract two tensors over one axis: features that are zero in both add nothing."""
    left, right, output = operation.need("x1"), operation.need("x2"), operation.output
    rank = operation.rank(output) + 1
    gone = operation.value("dim") % rank
    whole = operation.virtual("pairs", np.broadcast_shapes(operation.shape(left), operation.shape(right)))
    for key in (left, right):
        operation.link_broadcast(key, whole)
    for axis in range(rank):
        if axis != gone:
            operation.link(whole, axis, output, axis - (axis > gone))


RULES: Rules = {
    **rules_for(likeness, "cosine_similarity"),
    **rules_for(reduction, *SUMS, *STATISTICS),
    **rules_for(softmax, "softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax"),
    **rules_for(
        mixing,
        "cumsum",
        "cumprod",
        "cummax",
        "cummin",
        "logcumsumexp",
        "sort",
        "argsort",
        "topk",
        "diff",
    ),
}
