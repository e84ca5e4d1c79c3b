"""From values of single weights to scores of coupled classes: sums within each member, a mean over the members."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.graph.coupling.coupling import Member, Space
from mil_cli.graph.nodes import get_argument, get_attribute, op_name

NORMS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")

Scores = NDArray[np.float64]
"""One number a class, shape ``(classes,)``; NaN where a class has none."""


def class_sums(member: Member, size: int, lines: Tensor) -> Scores:
    """Sum values along the axis of a member over the entries of each class.

    Args:
        member: The axis of a weight.
        size: Number of classes of its space.
        lines: One value for each index of the axis.

    Returns:
        Sums; NaN for classes that have no entry on this axis.
    """
    labelled = member.classes >= 0
    classes = member.classes[labelled]
    values = lines.detach().double().cpu().numpy()[labelled]
    sums = np.bincount(classes, weights=values, minlength=size).astype(np.float64, copy=False)
    sums[np.bincount(classes, minlength=size) == 0] = np.nan
    return sums


def along(member: Member, values: Tensor) -> Tensor:
    """Return the sums over all other axes of values that are shaped like a member's weight."""
    others = [axis for axis in range(values.ndim) if axis != member.axis]
    return values.double().sum(others) if others else values.double()


def mean_of_members(size: int, rows: Iterable[Scores], *, normalise: bool) -> Scores:
    """Return for each class the mean of what its members say.

    Args:
        size: Number of classes.
        rows: The scores by member, none below 0.
        normalise: Divide each member's by their mean over the classes first, so that neither the size of a layer nor
            the scale of its weights counts; a member whose scores are all 0 says 0.
    """
    totals, counts = np.zeros(size), np.zeros(size)
    for row in rows:
        present = ~np.isnan(row)
        if not present.any():
            continue
        mean = float(row[present].mean()) if normalise else 1.0
        totals[present] += row[present] / mean if mean > 0 else 0.0
        counts[present] += 1
    means: Scores = np.divide(totals, counts, out=np.full(size, np.nan), where=counts > 0)
    return means


def scoring_members(graph: GraphModule, space: Space) -> list[Member]:
    """Return the members that say how much a class matters: weights, and the scales of norms; not biases."""
    scales = norm_parameters(graph, "weight")
    return [
        member
        for member in space.members
        if member.trainable and (get_attribute(graph, member.parameter).ndim > 1 or member.parameter in scales)
    ]


def norm_parameters(graph: GraphModule, argument: str, kinds: tuple[str, ...] = NORMS) -> dict[str, Node]:
    """Return the parameters that norms scale or shift channels by, all their names, with the node of the norm.

    Args:
        graph: The graph.
        argument: ``weight`` for the scales, ``bias`` for the shifts.
        kinds: Operators that count as norms.
    """
    named = list(graph.named_parameters(remove_duplicate=False))
    found: dict[str, Node] = {}
    for node in graph.graph.nodes:
        if op_name(node) in kinds:
            source = get_argument(node, argument)
            if isinstance(source, Node) and source.op == "get_attr":
                value = get_attribute(graph, str(source.target))
                found.update((name, node) for name, other in named if other is value)
    return found
