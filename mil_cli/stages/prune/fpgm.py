"""Pruning by the geometric median: filters that others can stand in for go first."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from mil_cli.graph.coupling.members import mean_of_members, scoring_members
from mil_cli.graph.nodes import get_attribute, op_name
from mil_cli.stages.prune.schedule import prune
from mil_cli.stages.prune.settings import StructuredPruningConfig
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from mil_cli.graph.coupling import Coupling, Member
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.stages.prune.selection import Scores

_OUTPUT_AXIS = {
    "linear": 0,
    "embedding": 1,
    **{f"conv{dimensions}d": 0 for dimensions in (1, 2, 3)},
    **{f"conv_transpose{dimensions}d": 1 for dimensions in (1, 2, 3)},
}


class FpgmConfig(StructuredPruningConfig):
    """Settings of pruning by the geometric median."""

    method: ClassVar[str] = "fpgm"


@stage(FpgmConfig)
def fpgm(model: Model, config: FpgmConfig, context: Context) -> Model:
    """Remove the filters nearest to the geometric median of their layer: the others hold what they hold.

    He et al. 2019, "Filter Pruning via Geometric Median" (CVPR). A filter is what a class of coupled channels has in
    a weight that makes them, all its rows together where it has several, as a head has.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, or nothing can be cut.
    """
    return prune(model, config, context, lambda current, coupling: distances(current.graph, coupling))


def distances(graph: GraphModule, coupling: Coupling) -> Scores:
    """Return by space the sum of each filter's distances to the others, over the mean; NaN without filters."""
    making = {
        (str(node.args[position].target), axis)
        for node in graph.graph.nodes
        if (axis := _OUTPUT_AXIS.get(op_name(node))) is not None
        for position in ((0,) if op_name(node) == "embedding" else (1,))
        if getattr(node.args[position], "op", "") == "get_attr"
    }
    found = []
    for space in coupling.spaces:
        members = [
            member for member in scoring_members(graph, space) if get_attribute(graph, member.parameter).ndim > 1
        ]
        makers = [member for member in members if any((name, member.axis) in making for name in member.names)]
        rows = []
        for member in makers or members:
            filters = _filters(get_attribute(graph, member.parameter).detach(), member, space.size)
            if filters is not None:
                rows.append(torch.cdist(filters, filters).sum(1).numpy())
        found.append(mean_of_members(space.size, rows, normalise=True))
    return found


def _filters(weight: Tensor, member: Member, size: int) -> Tensor | None:
    """Return what each class has of a weight, ``(classes, numbers)``; None unless all have as much."""
    counts = np.bincount(member.classes[member.classes >= 0], minlength=size)
    if counts.min() == 0 or counts.min() != counts.max():
        return None
    order = np.argsort(member.classes, kind="stable")[int((member.classes < 0).sum()) :]
    lines = weight.double().movedim(member.axis, 0)[torch.from_numpy(order.copy())]
    return lines.reshape(size, -1)
