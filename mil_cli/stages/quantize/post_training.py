"""What the methods share that quantize a trained model as it is: folded norms, a placement, and ranges from samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from mil_cli.stages.quantize.placement import Layer, Placement, place_any
from mil_cli.stages.quantize.ranges import affine_parameters
from mil_cli.stages.quantize.settings import QuantizationConfig, Rules
from mil_cli.stages.quantize.weights import WeightObserverName, protect_biases, weight_scale


class PostTrainingConfig(QuantizationConfig):
    """Settings of a method that quantizes a trained model as it is, beside those that all quantization shares.

    Attributes:
        observer: How the range of activations is found: ``min_max`` (all that was seen), ``moving_average`` (of each
            batch's), ``percentile`` (outliers clipped), ``mse`` (smallest squared error), ``entropy`` (least change of
            the distribution).
        percentile: For the percentile observer, in percent.
        weight_observer: How the range of weights is found.
    """

    observer: ObserverName = "mse"
    percentile: float = Field(99.99, gt=50, le=100)
    weight_observer: WeightObserverName = "mse"


@dataclass(frozen=True)
class Prepared:
    """A float model, and how each of its values and weights is to be quantized; nothing is inserted yet.

    Attributes:
        model: A copy of the stage's model, batch norms folded, in-place operators replaced. A method may change its
            weights before `insert`.
        placement: What is quantized, on the nodes of `model`.
        rules: The settings with the device's rules.
        values: How each owned value is quantized.
        narrow: How each value is that layers read in fewer bits.
        weights: How each layer's weight is, in the placement's order.
    """

    model: Model
    placement: Placement
    rules: Rules
    values: dict[Node, Quantizer]
    narrow: dict[Node, Quantizer]
    weights: Sequence[Quantizer]

    def insert(self) -> Model:
        """Put the quantizers into the graph, in place, and return the model."""
        insert_quantizers(self.model.graph, self.placement, self.values, self.narrow, self.weights)
        protect_biases(self.model.graph)
        return self.model


def prepare(model: Model, config: PostTrainingConfig, context: Context) -> Prepared:
    """Fold a model's batch norms, place quantizers and find their ranges on calibration samples.

    Layers whose input was nothing but zeros in calibration stay float.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives calibration samples and the device's rules; is told what the report shows.

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

    context.note(**placement.facts(), **rules.facts(), observer=config.observer)
    context.note(calibration_samples=config.calibration_samples)
    return Prepared(
        folded,
        placement,
        rules,
        values={node: quantizer(node, few=False) for node in placement.owned},
        narrow={node: quantizer(node, few=True) for node in placement.narrow},
        weights=[weight(layer) for layer in placement.layers],
    )
