"""What the methods share that quantize a trained model as it is: its weights made ready, a placement, and ranges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field
from torch.fx import Node

from mil_cli.graph.functional import make_functional
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_attribute
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.bias_correction import BiasCorrection
from mil_cli.stages.quantize.calibrate import place_observed, ranged_quantizers
from mil_cli.stages.quantize.equalisation import equalise
from mil_cli.stages.quantize.insert import Quantizer, insert_quantizers, refuse_quantized
from mil_cli.stages.quantize.layers import Layer, once_for_each_weight
from mil_cli.stages.quantize.placement import Placement, place_any
from mil_cli.stages.quantize.settings import ObservedConfig, Rules
from mil_cli.stages.quantize.settle import fold_weights
from mil_cli.stages.quantize.smoothing import smooth
from mil_cli.stages.quantize.weights import WeightObserverName, settle_biases, weight_scale


class PostTrainingConfig(ObservedConfig):
    """Settings of a method that quantizes a trained model as it is, beside those that all quantization shares.

    Attributes:
        weight_observer: How the range of weights is found.
        equalise: Whether neighbouring layers get weights of the same range first.
        smooth: How far outliers of activations are moved into the weights that read them, 0 to 1; None: not at all.
        bias_correction: Whether the mean of each layer's outputs is restored by its bias afterwards; None: where
            some weights have fewer than 8 bits.
    """

    version: ClassVar[int] = 7

    weight_observer: WeightObserverName = "mse"
    equalise: bool = False
    smooth: float | None = Field(None, ge=0, le=1)
    bias_correction: bool | None = False


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
        correction: Corrects biases once all is inserted; None: they stay.
    """

    model: Model
    placement: Placement
    rules: Rules
    values: dict[Node, Quantizer]
    narrow: dict[Node, Quantizer]
    weights: Sequence[Quantizer]
    correction: BiasCorrection | None = None

    def insert(self, *, correct: bool = True) -> Model:
        """Put the quantizers into the graph, in place, and return the model.

        Args:
            correct: Whether biases are corrected at once, if they are; else that is left to `correct`.
        """
        insert_quantizers(self.model.graph, self.placement, self.values, self.narrow, self.weights)
        settle_biases(self.model.graph)
        if correct:
            self.correct()
        return self.model

    def correct(self) -> None:
        """Correct the biases of the model with its quantizers, in place, if they are to be corrected."""
        if self.correction is not None:
            self.correction.apply(self.model)
            settle_biases(self.model.graph)


def prepare(
    model: Model,
    config: PostTrainingConfig,
    context: Context,
    *,
    fold: Callable[[Model], Model] = fold_weights,
) -> Prepared:
    """Fold a model's batch norms, prepare its weights, place quantizers and find their ranges on calibration samples.

    Layers whose input was nothing but zeros in calibration stay float.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives calibration samples and the device's rules; is told what the report shows.
        fold: Folds the batch norms; that of another method's settings prepares what that method quantizes.

    Raises:
        StageError: The model is quantized already, nothing in it can be quantized, or calibration fails.
    """
    refuse_quantized(model.graph)
    rules = Rules.of(config, context)
    folded = fold(model)
    graph = folded.graph
    make_functional(graph)
    if config.equalise:
        context.note(equalised_pairs=equalise(graph))
    if config.smooth is not None:
        smooth(folded, config.smooth, config, context, never=rules.never)
    placement, seen = place_observed(
        folded,
        lambda silent: place_any(
            graph, policy=rules.policy, skip=config.skip, narrow=rules.narrow, silent=silent, never=rules.never
        ),
        config.watcher,
        rules,
        config,
        context,
    )

    def weight(layer: Layer) -> Quantizer:
        axis, levels = rules.axis(layer), rules.weights(layer)
        tensor = get_attribute(graph, str(layer.weight.target))
        scale = weight_scale(tensor, axis=axis, codes=levels, observer=config.weight_observer)
        return Quantizer.of_weight(scale, levels, axis)

    few = any(rules.of_layer(layer).weight_bits < 8 for layer in placement.layers)
    corrects = few if config.bias_correction is None else config.bias_correction
    values, narrow = ranged_quantizers(seen)
    context.note(**placement.facts(), **rules.facts(), observer=config.observer)
    context.note(calibration_samples=min(config.calibration_samples, len(context.data.train)))
    return Prepared(
        folded,
        placement,
        rules,
        values=values,
        narrow=narrow,
        weights=once_for_each_weight(placement.layers, weight),
        correction=BiasCorrection.of(folded, placement, config, context) if corrects else None,
    )
