"""Damping of weights that swing between two values while they are trained through rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_argument, op_name
from mil_cli.ops import QUANTIZERS
from mil_cli.stages.quantize.settle import computed, only_attributes
from mil_cli.training.objective import StepHook


def dampen(strength: float) -> StepHook:
    """Return what draws weights to the values that they round to, before each step of the optimizer.

    Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training" (ICML): with straight-through gradients
    a weight whose best value lies between two levels swings from one to the other, and batch norms follow. The loss
    ``strength * sum (rounded - clipped)^2`` over all quantized weights is added, of which the rounded ones get no
    gradient; its strength grows from 0 along half a cosine, for weights must move before they settle.

    Args:
        strength: That of the last step.
    """

    def before_step(training: Model, steps: int, total: int) -> None:
        factor = strength * (1 - math.cos(math.pi * steps / max(total - 1, 1))) / 2
        graph = training.graph
        for quantizer in list(calls(graph)):
            weight = get_argument(quantizer, "x") if op_name(quantizer) in QUANTIZERS else None
            if isinstance(weight, Node) and only_attributes(weight):
                value = computed(graph, weight)
                if value.requires_grad:
                    pull = _distance(graph, quantizer, value).mul_(2 * factor)
                    torch.autograd.backward([value], [pull])

    return before_step


def _distance(graph: GraphModule, quantizer: Node, value: Tensor) -> Tensor:
    """Return how far each weight lies above the value that it rounds to, 0 where it is clipped."""
    leaf = value.detach().requires_grad_()
    rounded: Tensor = computed(graph, quantizer, {get_argument(quantizer, "x"): leaf})
    (inside,) = torch.autograd.grad(rounded.sum(), leaf)
    return (leaf - rounded).detach() * inside
