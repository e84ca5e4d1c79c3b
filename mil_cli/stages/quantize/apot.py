"""APoT: weights are sums of powers of two times a learned scale; activations learn theirs too."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_attribute, set_attribute
from mil_cli.ops.learned_scale import SMALLEST_SCALE
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.accuracy import within_drop
from mil_cli.stages.quantize.aware import AwareConfig, train_quantized
from mil_cli.stages.quantize.calibrate import Seen, ranged_quantizers
from mil_cli.stages.quantize.insert import Quantizer
from mil_cli.stages.quantize.latency_aware import where_faster
from mil_cli.stages.quantize.layers import Layer, once_for_each_weight
from mil_cli.stages.quantize.learned import insert_learned
from mil_cli.stages.quantize.levels import compute_weight, even, round_to_levels
from mil_cli.stages.quantize.observers.mse import MeanSquaredError
from mil_cli.stages.quantize.placement import Placement
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.settings import Rules
from mil_cli.stages.quantize.weights import level_scale
from mil_cli.stages.registry import stage

_aten = torch.ops.aten
_TERNARY = 3
_MOST = 8
"""The most bits of a weight."""


class ApotConfig(AwareConfig):
    """Settings of ``quantize/apot``: those that all training with quantizers shares."""

    method: ClassVar[str] = "apot"
    version: ClassVar[int] = 7


@stage(ApotConfig)
@where_faster
@within_drop
def quantize(model: Model, config: ApotConfig, context: Context) -> Model:
    """Train a copy of a float model whose weights round to sums of powers of two, and fold its batch norms.

    Li, Dong and Wang 2020, "Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization for Neural
    Networks" (ICLR): levels lie closer near 0, where most weights are (see `additive_levels`). While training, the
    weights of a layer are normalised to mean 0 and a constant deviation, and the scale of the levels, the clip of the
    paper, learns by their reparameterised gradient, which is that of LSQ for these levels. The deviation is that which
    the layer came with, instead of the paper's 1, so that layers without a batch norm keep their size.

    Activations are rounded evenly with learned scales, since that is what integer kernels multiply; the paper has
    powers of two there as well. First and last layers are even too where they have more bits than those between, and
    so are weights that are mostly their mean, such as filters that average, which normalising would undo. With 2 bits
    the levels are -1, 0 and 1: three of the four that the bits could tell apart. The levels of 7 and 8 bits are too
    fine for integer kernels, which get them rounded (see `whole_levels`).

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives data, the device's rules, and the training.

    Returns:
        The model in the form that post-training quantization gives it too, weights on levels: it can be trained
        further, and exported.

    Raises:
        StageError: The model is quantized already, nothing in it can be quantized, calibration fails, or there is no
            stage `distill` that trains.
    """
    return train_quantized(model, config, context, watcher=MeanSquaredError, insert=_insert)


def additive_levels(bits: int) -> Tensor:
    """Return the levels of the paper as whole numbers, sorted: ``[2^bits - 1]``, symmetric around 0.

    One bit is the sign; the others are n pairs, and one that is left where their number is odd. Pair i adds one of
    ``0, 2^-i, 2^-(i+n)`` and ``2^-(i+2n)``, and where a bit is left over it adds 0 or ``2^-(2n+1)``, and the last of
    each pair is ``2^-(i+2n+1)``. All are multiplied by the power of two that makes the smallest 1.

    Args:
        bits: 2 to 8.
    """
    pairs, left = divmod(bits - 1, 2)
    smallest = 3 * pairs + left
    terms = [[i, i + pairs, i + 2 * pairs + left] for i in range(1, pairs + 1)] + [[2 * pairs + 1]] * left
    sums = torch.zeros(1)
    for exponents in terms:
        choices = torch.tensor([0.0, *(2.0 ** (smallest - exponent) for exponent in exponents)])
        sums = (sums[:, None] + choices).flatten()
    positive = sums.sort().values
    return torch.cat([-positive[1:].flip(0), positive])


def _insert(model: Model, placement: Placement, seen: Seen[MeanSquaredError], rules: Rules) -> None:
    graph = model.graph
    values, narrow = ranged_quantizers(seen)
    fewest = _fewest_bits(placement, rules)

    def weight(layer: Layer) -> Quantizer:
        levels = _levels(graph, layer, rules, fewest)
        return even(graph, layer, rules) if levels is None else _additive(graph, layer, levels, rules)

    weights = once_for_each_weight(placement.layers, weight)
    paths = insert_learned(model, placement, values, narrow, weights)
    for path, layer in dict(zip(paths.weights, placement.layers, strict=True)).items():
        additive = _levels(graph, layer, rules, fewest)
        if additive is None:
            continue
        stored: Tensor = get_attribute(graph, str(layer.weight.target)).detach()
        set_attribute(graph, f"{path}.size", stored.std(correction=0))
        compute_weight(graph, path, partial(_normalise, size=f"{path}.size"))
        if len(additive) > _TERNARY:
            round_to_levels(graph, path, additive)


def _fewest_bits(placement: Placement, rules: Rules) -> int:
    """Return the fewest bits that the settings give weights, or have given those between the first and last layers."""
    inner = [rules.of_layer(layer).weight_bits for layer in placement.products if not layer.edge]
    return min([*inner, rules.weight_bits])


def _levels(graph: GraphModule, layer: Layer, rules: Rules, fewest: int) -> Tensor | None:
    """Return the levels of a layer's weight; None: it is even.

    That are tables, first and last layers that have more bits, layers of 8 bits where others have fewer, for levels of
    8 bits lose some to rounding, and weights whose mean is most of them, a filter that averages say: normalised to mean
    0 they would be something else, or nothing at all.
    """
    bits = rules.of_layer(layer).weight_bits
    weight: Tensor = get_attribute(graph, str(layer.weight.target)).detach()
    if weight.mean().square() > weight.var(correction=0):
        return None
    if layer.has_table or (bits > fewest and (bits == _MOST or any(each.edge for each in layer.sharing))):
        return None
    return whole_levels(bits, largest=rules.largest_weight)


def whole_levels(bits: int, *, largest: int) -> Tensor:
    """Return the levels in whole numbers that integer kernels take: those of the paper if they fit, else rounded.

    Args:
        bits: 2 to 8.
        largest: The largest number that fits. Levels that would be larger are rounded to shares of it, so that some
            near 0 fall together.
    """
    levels = additive_levels(bits)
    return levels if levels[-1] <= largest else torch.unique((levels * (largest / levels[-1])).round())


def _additive(graph: GraphModule, layer: Layer, levels: Tensor, rules: Rules) -> Quantizer:
    weight: Tensor = get_attribute(graph, str(layer.weight.target)).detach()
    axis, last = rules.axis(layer), int(levels[-1])
    scale = level_scale(weight - weight.mean(), axis=axis, levels=levels)
    return Quantizer.of_weight(scale, CodeRange(-last, last), axis)


def _normalise(graph: Graph, weight: Node, *, size: str) -> Node:
    """Write ``size * (weight - mean) / deviation``, both over the whole weight."""
    mean = graph.call_function(_aten.mean.default, (weight,))
    centred = graph.call_function(_aten.sub.Tensor, (weight, mean))
    deviation = graph.call_function(_aten.std.correction, (weight,), {"correction": 0})
    positive = graph.call_function(_aten.clamp_min.default, (deviation, SMALLEST_SCALE))
    unit = graph.call_function(_aten.div.Tensor, (centred, positive))
    return graph.call_function(_aten.mul.Tensor, (unit, graph.get_attr(size)))
