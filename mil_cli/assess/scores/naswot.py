"""NASWOT: whether samples are told apart by which rectifiers they switch on."""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.assess.scores.layers import depending_on_inputs
from mil_cli.assess.scores.samples import layouts
from mil_cli.assess.scores.subject import Subject
from mil_cli.errors import ModelError
from mil_cli.graph.nodes import calls, get_argument, op_name
from mil_cli.graph.watch import watched

_RECTIFIERS = frozenset({"relu", "relu6", "leaky_relu", "prelu", "_prelu_kernel", "rrelu"})
_SMOOTH = frozenset({"gelu", "silu", "hardswish", "mish", "elu", "celu", "selu"})
"""Rectifiers without a kink: their sign says the same."""
_BOUNDED_BELOW = {"clamp": "min", "clamp_min": "min", "hardtanh": "min_val"}
"""Operators that are rectifiers where the named argument is 0."""


def naswot(subject: Subject) -> float:
    """Return ``log |det K|``, where K counts for each two samples the rectifiers that both or neither switch on.

    Mellor et al. 2021, "Neural architecture search without training". Every call of a rectifier counts, whether it is a
    module or a function. The authors' code sees modules called ReLU alone (leaky and parametric ones among them); here
    the smooth ones (GELU, SiLU, h-swish, ...) are on where what they read is above 0, so that transformers have codes
    too. Minus infinity where two samples have one code.

    Raises:
        ModelError: The model has no rectifier, or samples depend on each other.
    """
    graph = subject.network.graph
    read = Counter(_rectified(graph))
    if not read:
        raise ModelError(
            "the model has no rectifier (ReLU and its kin) whose on and off could be a code",
            hint="take a score that looks at gradients",
        )
    places = layouts(subject, read)
    alike = torch.zeros(subject.samples, subject.samples, dtype=torch.float64)

    def look(node: Node, value: Tensor) -> None:
        nonlocal alike
        on = (places[node].by_sample(value, subject.samples).flatten(1) > 0).float()
        ones = on.sum(1).double()
        # Both on, and both off: n - ones_i - ones_j + both on.
        both = 2 * (on @ on.T).double() + on.shape[1] - ones[:, None] - ones
        alike = alike + read[node] * both.cpu()

    runner = watched(graph, {node: partial(look, node) for node in read})
    with torch.no_grad():
        subject.run(runner, subject.task.inputs(subject.batches[0]))
    return float(torch.linalg.slogdet(alike).logabsdet)


def _rectified(graph: GraphModule) -> list[Node]:
    """Return what each rectifier reads, where that depends on an input."""
    depending = depending_on_inputs(graph)
    return [node.args[0] for node in calls(graph) if _is_rectifier(node) and node in depending]  # type: ignore[misc]


def _is_rectifier(node: Node) -> bool:
    name = op_name(node).removesuffix("_")
    if name in _BOUNDED_BELOW:
        bound = get_argument(node, _BOUNDED_BELOW[name])
        return isinstance(bound, int | float) and bound == 0
    return name in _RECTIFIERS or name in _SMOOTH
