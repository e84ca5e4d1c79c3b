"""LSQ+: the ranges of activations learn both their step and where they begin."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_argument, get_attribute, set_attribute
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.accuracy import within_drop
from mil_cli.stages.quantize.aware import AwareConfig, train_quantized
from mil_cli.stages.quantize.calibrate import Seen, ranged_quantizers
from mil_cli.stages.quantize.insert import Quantizer, quantizers_at, replace_quantizer
from mil_cli.stages.quantize.latency_aware import where_faster
from mil_cli.stages.quantize.layers import Layer, once_for_each_weight
from mil_cli.stages.quantize.learned import insert_learned, one_sided_codes
from mil_cli.stages.quantize.observers.mse import MeanSquaredError
from mil_cli.stages.quantize.placement import Placement
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.settings import Rules
from mil_cli.stages.quantize.settle import forget, read_attributes
from mil_cli.stages.quantize.weights import as_scale, rows_of, weight_scale
from mil_cli.stages.registry import stage

WeightStart = Literal["mse", "three_sigma"]


class LsqPlusConfig(AwareConfig):
    """Settings of ``quantize/lsq_plus``, beside those that all training with quantizers shares.

    Attributes:
        weight_start: Where the scales of weights start: ``mse`` (smallest squared error of rounding), or
            ``three_sigma`` (the paper's: the codes reach three standard deviations from the mean).
    """

    method: ClassVar[str] = "lsq_plus"

    weight_start: WeightStart = "mse"


@stage(LsqPlusConfig)
@where_faster
@within_drop
def quantize(model: Model, config: LsqPlusConfig, context: Context) -> Model:
    """Train a copy of a float model with quantizers whose scales and offsets learn, and fold its batch norms.

    Bhalgat et al. 2020, "LSQ+: Improving low-bit quantization through learnable offsets and better initialization":
    activations that go below 0, as those of SiLU, GELU and h-swish, have a learned offset beside the learned scale of
    LSQ; both start where the squared error of rounding is smallest. While it trains, the offset already counts as a
    whole number of steps (see `mil_cli.ops.quantize_offset`), so that the zero point of the file is the one that was
    trained with. Values that never go below 0 have plain LSQ, as have the weights.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives data, the device's rules, and the training.

    Returns:
        The model in the form that post-training quantization gives it too: it can be trained further, and exported.

    Raises:
        StageError: The model is quantized already, nothing in it can be quantized, calibration fails, or there is no
            stage `distill` that trains.
    """
    context.note(weight_start=config.weight_start)
    insert = partial(_insert, weight_start=config.weight_start)
    return train_quantized(model, config, context, watcher=MeanSquaredError, insert=insert)


def _insert(
    model: Model, placement: Placement, seen: Seen[MeanSquaredError], rules: Rules, weight_start: WeightStart
) -> None:
    graph = model.graph
    codes, gammas = one_sided_codes(model, placement.layers, rules)
    values, narrow = ranged_quantizers(seen)

    def weight(layer: Layer) -> Quantizer:
        return _weight(graph, layer, codes[layer.node], rules, weight_start)

    weights = once_for_each_weight(placement.layers, weight)
    paths = insert_learned(model, placement, values, narrow, weights, gammas=gammas)
    read = read_attributes(graph)
    for few, places in ((False, paths.values), (True, paths.narrow)):
        for node, path in places.items():
            low, _ = seen.ranges[node, few]
            if low < 0:
                _learn_offset(graph, path, start=low)
    forget(graph, read - read_attributes(graph))
    graph.graph.lint()
    graph.recompile()


def _learn_offset(graph: GraphModule, path: str, *, start: float) -> None:
    """Give the quantizers below `path` a trainable offset, in place; its gradient gets the factor of the scale's."""
    set_attribute(graph, f"{path}.offset", nn.Parameter(torch.tensor(start)))
    for node in quantizers_at(graph, path):
        scale = get_argument(node, "scale")
        with graph.graph.inserting_before(node):
            offset = graph.graph.get_attr(f"{path}.offset")
        limits = (get_argument(node, name) for name in ("quant_min", "quant_max"))
        arguments = (get_argument(node, "x"), scale, offset, get_argument(scale, "gradient_factor"), *limits)
        replace_quantizer(graph, node, torch.ops.mil.quantize_offset.default, arguments)


def _weight(graph: GraphModule, layer: Layer, codes: CodeRange, rules: Rules, start: WeightStart) -> Quantizer:
    axis = rules.axis(layer)
    weight: Tensor = get_attribute(graph, str(layer.weight.target)).detach()
    scale = weight_scale(weight, axis=axis, codes=codes, observer="mse")
    if start == "three_sigma":
        scale = three_sigma_scale(weight, axis=axis, codes=codes)
    return Quantizer.of_weight(scale, codes, axis)


def three_sigma_scale(weight: Tensor, *, axis: int | None, codes: CodeRange) -> Tensor:
    """Return the paper's start of a weight's scale, ``max(|mean - 3 std|, |mean + 3 std|) / 2^(bits-1)``.

    Args:
        weight: The weight, any shape.
        axis: The axis of its output channels, each of which gets a scale; None gives one for all.
        codes: The codes; ``2^(bits-1)`` is what they reach below 0.

    Returns:
        float32, shape ``[weight.shape[axis]]``, or ``[]``.
    """
    rows = rows_of(weight, axis)
    reach = (rows.mean(1).abs() + 3 * rows.std(1, correction=0)) / -codes.quant_min
    return as_scale(torch.where(reach > 0, reach, reach.max()), axis)
