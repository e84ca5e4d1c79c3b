"""Reductions, softmax, sorting: ops that mix the entries of an axis."""

from __future__ import annotations

from mil_cli.graph.coupling.relations.pointwise import pointwise
from mil_cli.graph.coupling.table import Operation, Rules, UnsupportedForm, rules_for

SUMS = ("sum", "linalg_vector_norm", "norm", "frobenius_norm", "nansum")
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
)


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
    if operation.name not in SUMS:
        operation.inexact(data, reduced, f"{operation.name} over the axis")
    if operation.name in ("argmax", "argmin") or (len(operation.outputs) > 1 and operation.name in ("max", "min")):
        operation.freeze(data, reduced, f"{operation.name} gives positions on the axis")


def mixing(operation: Operation) -> None:
    """Freeze the axis along which entries are compared, normalised or accumulated; relate the others."""
    data = operation.input
    axis = operation.axis(data, operation.value("dim", -1))
    for key in [*operation.inputs, *operation.outputs]:
        operation.freeze(key, axis, f"{operation.name} over the axis")
    for output in operation.outputs:
        for key in operation.inputs:  # differences take what stands before and behind as tensors of their own
            operation.link_all(key, output, but=(axis,))


def fourier(operation: Operation) -> None:
    """Freeze the axes that are transformed, of which one may be halved; relate the others."""
    data, output = operation.input, operation.output
    rank, several = operation.rank(data), operation.name.endswith(("n", "2"))
    given = operation.value("dim", None if several else -1)
    if given is None:
        sizes = operation.value("s")
        given = range(rank) if sizes is None else range(rank - len(sizes), rank)
    axes = {operation.axis(data, axis) for axis in ([given] if isinstance(given, int) else given)}
    for key in (data, output):
        operation.freeze(key, axes, "a Fourier transform over the axis")
    operation.link_all(data, output, but=axes)


_TRANSFORMS = tuple(
    f"fft_{inverse}{kind}fft{axes}" for inverse in ("", "i") for kind in ("", "r") for axes in ("", "2", "n")
)

RULES: Rules = {
    **rules_for(reduction, *SUMS, *STATISTICS),
    **rules_for(fourier, *_TRANSFORMS),
    **rules_for(
        mixing,
        "softmax",
        "log_softmax",
        "_softmax",
        "_log_softmax",
        "_safe_softmax",
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
