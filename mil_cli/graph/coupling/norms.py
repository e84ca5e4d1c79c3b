"""The importance of coupled classes by the size of their weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from mil_cli.graph.coupling.coupling import Coupling, Member
from mil_cli.graph.coupling.members import Scores, class_sums, mean_of_members, scoring_members
from mil_cli.graph.nodes import get_attribute


def group_norms(graph: GraphModule, coupling: Coupling, *, order: int = 2, normalise: bool = True) -> list[Scores]:
    """Return the importance of every class of every space.

    In each member (a weight's axis, or the scale of a norm) the norm of all entries of a class is taken and divided by
    the mean over the classes, so that neither the size of a layer nor the scale of its weights counts; a class's
    score is the mean over its members, and 1 where it has none.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets"; Fang et al. 2023, "DepGraph", for coupled groups.

    Args:
        graph: Gives the present weights.
        coupling: Its analysis.
        order: 1 or 2.
        normalise: Whether to divide by the means.

    Returns:
        By space: an array with one score per class, shape (classes,).
    """
    found = []
    for space in coupling.spaces:
        rows = [
            _norms(get_attribute(graph, member.parameter), member, space.size, order)
            for member in scoring_members(graph, space)
        ]
        scores = mean_of_members(space.size, rows, normalise=normalise)
        found.append(np.where(np.isnan(scores), 1.0, scores))
    return found


def _norms(weight: Tensor, member: Member, size: int, order: int) -> Scores:
    others = [axis for axis in range(weight.ndim) if axis != member.axis]
    lengths = torch.linalg.vector_norm(weight.detach(), ord=order, dim=others) if others else weight.detach().abs()
    return class_sums(member, size, lengths.double().pow(order)) ** (1 / order)
