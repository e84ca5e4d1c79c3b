"""The weights of DoReFa: bounded by a hyperbolic tangent over its maximum, and rounded to levels around 0."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from mil_cli.graph.nodes import get_attribute, set_attribute
from mil_cli.ops.learned_scale import SMALLEST_SCALE
from mil_cli.ops.levels import quantize_levels
from mil_cli.stages.quantize.insert import Quantizer
from mil_cli.stages.quantize.layers import Layer
from mil_cli.stages.quantize.levels import compute_weight, even, round_to_levels
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.settings import Rules
from mil_cli.stages.quantize.weights import as_scale

_aten = torch.ops.aten


def squashed(graph: GraphModule, layer: Layer, rules: Rules) -> Quantizer:
    """Return the quantizer of a layer's weight once `squash` bounds it.

    Its scale is that with which the rounded weights come nearest to the weights as they are, by least squares; its
    codes reach the largest level. Tables of embeddings are not squashed: among levels without a 0 there would be none
    for the rows of padding.
    """
    if layer.has_table:
        return even(graph, layer, rules)
    weight: Tensor = get_attribute(graph, str(layer.weight.target)).detach().double()
    levels = levels_of(rules.weights(layer), largest=rules.largest_weight).double()
    axis, last = rules.axis(layer), int(levels[-1])
    others = _others(weight, axis)
    bounded = weight.tanh()
    bounded = bounded / bounded.abs().amax(others, keepdim=True).clamp(min=SMALLEST_SCALE)
    rounded = quantize_levels(bounded, torch.tensor(1 / last, dtype=torch.float64), levels, None)
    factor = (weight * rounded).sum(others) / rounded.square().sum(others).clamp(min=SMALLEST_SCALE)
    scale = as_scale(factor.reshape(-1) / last, axis)
    return Quantizer.of_weight(scale, CodeRange(-last, last), axis)


def squash(
    graph: GraphModule, layers: Sequence[Layer], weights: Sequence[Quantizer], paths: Sequence[str], rules: Rules
) -> None:
    """Let quantizers of weights round their hyperbolic tangent over its maximum, in place.

    Args:
        graph: The graph.
        layers: The layers.
        weights: How the weight of each is quantized, as `squashed` says.
        paths: Where scale and zero point of each are kept.
        rules: As for `squashed`.
    """
    parts = {path: (layer, form) for layer, form, path in zip(layers, weights, paths, strict=True)}
    for path, (layer, form) in parts.items():
        if layer.has_table:
            continue
        weight: Tensor = get_attribute(graph, str(layer.weight.target))
        others = _others(weight, form.axis)
        shape = [1 if dimension in others else weight.shape[dimension] for dimension in range(weight.ndim)]
        set_attribute(graph, f"{path}.size", (form.scale * form.codes.quant_max).reshape(shape))
        compute_weight(graph, path, partial(_bound, size=f"{path}.size", others=others))
        levels = levels_of(rules.weights(layer), largest=rules.largest_weight)
        if len(levels) != form.codes.steps + 1:
            round_to_levels(graph, path, levels)


def levels_of(codes: CodeRange, *, largest: int) -> Tensor:
    """Return the levels of DoReFa's weights as whole numbers, sorted.

    Args:
        codes: The codes that the weight would have elsewhere: as many levels.
        largest: The largest whole number that integer kernels take.

    Returns:
        ``[levels]``: the odd numbers around 0 where they fit, else all numbers of the symmetric codes.
    """
    if codes != codes.symmetric() and codes.steps <= largest:
        return torch.arange(-codes.steps, codes.steps + 1, 2, dtype=torch.float32)
    even = codes.symmetric()
    return torch.arange(even.quant_min, even.quant_max + 1, dtype=torch.float32)


def _bound(graph: Graph, weight: Node, *, size: str, others: list[int]) -> Node:
    """Write ``size * tanh(weight) / max |tanh(weight)|``, the maximum over the dimensions `others`."""
    tangent = graph.call_function(_aten.tanh.default, (weight,))
    magnitude = graph.call_function(_aten.abs.default, (tangent,))
    largest = graph.call_function(_aten.amax.default, (magnitude, others, True))
    positive = graph.call_function(_aten.clamp_min.default, (largest, SMALLEST_SCALE))
    unit = graph.call_function(_aten.div.Tensor, (tangent, positive))
    return graph.call_function(_aten.mul.Tensor, (unit, graph.get_attr(size)))


def _others(weight: Tensor, axis: int | None) -> list[int]:
    return [dimension for dimension in range(weight.ndim) if dimension != axis]
