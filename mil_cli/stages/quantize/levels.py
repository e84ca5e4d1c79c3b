"""Weights that are computed from parameters and rounded to levels of any distance, while they are trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from mil_cli.graph.nodes import get_argument, get_attribute, set_argument, set_attribute
from mil_cli.stages.quantize.insert import Quantizer, quantizers_at, replace_quantizer
from mil_cli.stages.quantize.layers import Layer
from mil_cli.stages.quantize.settings import Rules
from mil_cli.stages.quantize.settle import forget, read_attributes
from mil_cli.stages.quantize.weights import weight_scale

Compute = Callable[[Graph, Node], Node]
"""Writes the operators that make a weight of the node that reads its parameter; returns the last of them."""


def compute_weight(graph: GraphModule, path: str, compute: Compute) -> None:
    """Let the quantizer below `path` round what is computed from its weight, in place; that becomes a parameter."""
    for quantizer in quantizers_at(graph, path):
        name = str(get_argument(quantizer, "x").target)
        stored = get_attribute(graph, name)
        if not isinstance(stored, nn.Parameter):
            set_attribute(graph, name, nn.Parameter(stored, requires_grad=False))
        with graph.graph.inserting_before(quantizer):
            set_argument(quantizer, "x", compute(graph.graph, get_argument(quantizer, "x")))
    graph.recompile()


def even(graph: GraphModule, layer: Layer, rules: Rules) -> Quantizer:
    """Return the quantizer of a layer's weight with symmetric codes, for one that gets none of a method's levels."""
    codes, axis = rules.weights(layer).symmetric(), rules.axis(layer)
    scale = weight_scale(get_attribute(graph, str(layer.weight.target)), axis=axis, codes=codes, observer="mse")
    return Quantizer.of_weight(scale, codes, axis)


def round_to_levels(graph: GraphModule, path: str, levels: Tensor) -> None:
    """Let the weight's quantizer below `path` round to levels times its scale, in place.

    Args:
        graph: The graph.
        path: Where scale and zero point are kept; the zero point goes.
        levels: float32, sorted, ``[levels]``, in units of the scale.
    """
    read = read_attributes(graph)
    set_attribute(graph, f"{path}.levels", levels.clone())
    for quantizer in quantizers_at(graph, path):
        with graph.graph.inserting_before(quantizer):
            stored = graph.graph.get_attr(f"{path}.levels")
        arguments = (get_argument(quantizer, "x"), get_argument(quantizer, "scale"), stored)
        replace_quantizer(
            graph, quantizer, torch.ops.mil.quantize_levels.default, (*arguments, get_argument(quantizer, "axis"))
        )
    forget(graph, read - read_attributes(graph))
    graph.graph.lint()
    graph.recompile()
