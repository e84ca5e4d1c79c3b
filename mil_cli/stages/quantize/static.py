"""Post-training quantization with static ranges: integer weights and activations, from some calibration samples."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch.fx import Node

from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_attribute
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.calibrate import place_observed
from mil_cli.stages.quantize.functional import make_functional
from mil_cli.stages.quantize.insert import Quantizer, insert_quantizers, refuse_quantized
from mil_cli.stages.quantize.observers import ObserverName, make_observer
from mil_cli.stages.quantize.placement import Layer, place_any
from mil_cli.stages.quantize.ranges import affine_parameters
from mil_cli.stages.quantize.settings import QuantizationConfig, Rules
from mil_cli.stages.quantize.weights import WeightObserverName, protect_biases, weight_scale
from mil_cli.stages.registry import stage


class StaticConfig(QuantizationConfig):
    """Settings of ``quantize/static``, beside those that all quantization shares.

    Attributes:
        observer: How the range of activations is found: ``min_max`` (all that was seen), ``percentile`` (outliers
            clipped), ``mse`` (smallest squared error).
        percentile: For the percentile observer, in percent.
        weight_observer: How the range of weights is found.
    """

    method: ClassVar[str] = "static"
    version: ClassVar[int] = 4

    observer: ObserverName = "mse"
    percentile: float = Field(99.99, gt=50, le=100)
    weight_observer: WeightObserverName = "mse"


@stage(StaticConfig)
def quantize(model: Model, config: StaticConfig, context: Context) -> Model:
    """Return `model` with its batch norms folded and quantizers in its graph.

    The result computes in float what integer kernels compute; it can be trained further, and its export holds
    integers. Layers whose input was nothing but zeros in calibration stay float. Post-training quantization as in
    Krishnamoorthi, Quantizing deep convolutional networks for efficient inference (2018).

    Args:
        model: A float model.
        config: The settings.
        context: Gives calibration samples and the device's rules.

    Raises:
        StageError: The model is quantized already, nothing in it can be quantized, or calibration fails.
    """
    refuse_quantized(model.graph)
    rules = Rules.of(config, context)
    folded = fold_batch_norm(model)
    graph = folded.graph
    make_functional(graph)
    placement, seen = place_observed(
        folded,
        lambda silent: place_any(graph, policy=rules.policy, skip=config.skip, narrow=rules.narrow, silent=silent),
        lambda codes: make_observer(config.observer, codes=codes, percentile=config.percentile),
        rules,
        config,
        context,
    )

    def quantizer(node: Node, *, few: bool) -> Quantizer:
        codes = rules.values(narrow=few)
        scale, zero_point = affine_parameters(*seen.ranges[node, few], codes)
        return Quantizer(torch.tensor(scale), torch.tensor(zero_point), codes)

    def weight(layer: Layer) -> Quantizer:
        axis, levels = layer.axis if rules.per_channel else None, rules.weights(edge=layer.edge)
        tensor = get_attribute(graph, str(layer.weight.target))
        scale = weight_scale(tensor, axis=axis, codes=levels, observer=config.weight_observer)
        return Quantizer(scale, torch.zeros(scale.shape, dtype=torch.int32), levels, axis)

    values = {node: quantizer(node, few=False) for node in placement.owned}
    narrow = {node: quantizer(node, few=True) for node in placement.narrow}
    insert_quantizers(graph, placement, values, narrow, [weight(layer) for layer in placement.layers])
    protect_biases(graph)
    context.note(**placement.facts(), **rules.facts(), observer=config.observer)
    context.note(calibration_samples=config.calibration_samples)
    return folded
