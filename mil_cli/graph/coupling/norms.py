"""The importance of coupled classes by the size of their weights."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.graph.coupling.coupling import Coupling, Space
from mil_cli.graph.nodes import get_argument, get_attribute, op_name

_NORMS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")


def group_norms(graph: GraphModule, coupling: Coupling, *, order: int = 2) -> list[NDArray[np.float64]]:
    """Return the importance of every class of every space.

    In each member (a weight's axis, or the scale of a norm) the norm of all entries of a class is taken and divided by
    the mean over the classes, so that neither the size of a layer nor the scale of its weights counts; a class's
    score is the mean over its members.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets"; Fang et al. 2023, "DepGraph", for coupled groups.

    Args:
        graph: Gives the present weights.
        coupling: Its analysis.
        order: 1 or 2.

    Returns:
        By space: an array with one score per class, shape (classes,).
    """
    scales = _norm_scales(graph)
    return [_space_norms(graph, space, scales, order) for space in coupling.spaces]


def _space_norms(graph: GraphModule, space: Space, scales: set[str], order: int) -> NDArray[np.float64]:
    totals = np.zeros(space.size)
    counts = np.zeros(space.size)
    for member in space.members:
        weight: Tensor = get_attribute(graph, member.parameter)
        if not member.trainable or (weight.ndim < 2 and member.parameter not in scales):
            continue
        labelled = member.classes >= 0
        others = [axis for axis in range(weight.ndim) if axis != member.axis]
        lengths = torch.linalg.vector_norm(weight.detach(), ord=order, dim=others) if others else weight.detach().abs()
        powers = lengths.double().pow(order).numpy()
        sums = np.bincount(member.classes[labelled], weights=powers[labelled], minlength=space.size)
        present = np.bincount(member.classes[labelled], minlength=space.size) > 0
        norms = sums ** (1 / order)
        mean = norms[present].mean()
        if mean > 0:
            totals[present] += norms[present] / mean
        counts[present] += 1
    return np.divide(totals, counts, out=np.ones(space.size), where=counts > 0)


def _norm_scales(graph: GraphModule) -> set[str]:
    """Return the names of the parameters that scale the channels of a normalisation."""
    names: set[str] = set()
    for node in graph.graph.nodes:
        if op_name(node) in _NORMS:
            scale = get_argument(node, "weight")
            if isinstance(scale, Node) and scale.op == "get_attr":
                value = get_attribute(graph, str(scale.target))
                named = graph.named_parameters(remove_duplicate=False)
                names.update(name for name, other in named if other is value)
    return names
