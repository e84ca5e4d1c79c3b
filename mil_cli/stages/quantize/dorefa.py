"""DoReFa: weights squashed by a hyperbolic tangent and rounded, activations clipped to a fixed range and rounded."""

from __future__ import annotations

from typing import ClassVar

from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.accuracy import within_drop
from mil_cli.stages.quantize.aware import AwareConfig, train_quantized
from mil_cli.stages.quantize.calibrate import Seen, ranged_quantizers
from mil_cli.stages.quantize.insert import insert_quantizers
from mil_cli.stages.quantize.latency_aware import where_faster
from mil_cli.stages.quantize.layers import once_for_each_weight
from mil_cli.stages.quantize.observers import Observer
from mil_cli.stages.quantize.placement import Placement
from mil_cli.stages.quantize.settings import ObservedConfig, Rules
from mil_cli.stages.quantize.squashed import squash, squashed
from mil_cli.stages.registry import stage


class DorefaConfig(AwareConfig, ObservedConfig):
    """Settings of ``quantize/dorefa``, beside those that all training with quantizers shares.

    Attributes:
        observer: How the range that activations are clipped to is found; as for ``quantize/static``.
    """

    method: ClassVar[str] = "dorefa"


@stage(DorefaConfig)
@where_faster
@within_drop
def quantize(model: Model, config: DorefaConfig, context: Context) -> Model:
    """Train a copy of a float model with the quantizers of DoReFa, none of which learns, and fold its batch norms.

    Zhou et al. 2016, "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients":
    weights are ``2 q(tanh(w) / (2 max |tanh(w)|) + 1/2) - 1``, q rounding [0, 1] to ``2^bits - 1`` steps; activations
    are clipped to [0, 1] and rounded likewise. Gradients are straight-through, and stay float here: rounding them is of
    use to training alone. What lets it take any trained graph:

    * Weights are multiplied by the constant that brings the rounded ones nearest to those that came in (least
      squares), so that layers without a batch norm keep their size. The maximum is that of an output channel, or of
      the weight where there is one scale for it, as in the paper.
    * Activations are clipped to the range of calibration instead of [0, 1], which stays as it is.
    * The levels of fewer than 8 bits are those of the paper, none of which is 0. 8 bits have the even codes of all
      other methods, since no integer type holds the paper's 256.

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
    context.note(observer=config.observer)
    return train_quantized(model, config, context, watcher=config.watcher, insert=_insert)


def _insert(model: Model, placement: Placement, seen: Seen[Observer], rules: Rules) -> None:
    values, narrow = ranged_quantizers(seen)
    weights = once_for_each_weight(placement.layers, lambda layer: squashed(model.graph, layer, rules))
    paths = insert_quantizers(model.graph, placement, values, narrow, weights)
    squash(model.graph, placement.layers, weights, paths.weights, rules)
