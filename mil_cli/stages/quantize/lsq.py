"""Learned step size quantization: the scales of weights and activations are trained together with the weights."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from mil_cli.graph.model import Model
from mil_cli.graph.nodes import get_attribute
from mil_cli.ops.learned_scale import SMALLEST_SCALE
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.accuracy import within_drop
from mil_cli.stages.quantize.aware import AwareConfig, train_quantized
from mil_cli.stages.quantize.calibrate import Seen
from mil_cli.stages.quantize.insert import Quantizer
from mil_cli.stages.quantize.latency_aware import where_faster
from mil_cli.stages.quantize.layers import Layer, once_for_each_weight
from mil_cli.stages.quantize.learned import insert_learned, one_sided_codes
from mil_cli.stages.quantize.observers.magnitude import MeanMagnitude
from mil_cli.stages.quantize.observers.mse import MeanSquaredError
from mil_cli.stages.quantize.placement import Placement
from mil_cli.stages.quantize.ranges import CodeRange, affine_parameters
from mil_cli.stages.quantize.settings import Rules
from mil_cli.stages.quantize.weights import weight_scale
from mil_cli.stages.registry import stage

Initialization = Literal["mse", "mean"]


class LsqConfig(AwareConfig):
    """Settings of ``quantize/lsq``, beside those that all training with quantizers shares.

    Attributes:
        initialization: Where the scales start: ``mse`` (smallest squared error of rounding), or ``mean`` (the paper's:
            twice the mean magnitude over the root of the largest code; values that go below 0 start as ``mse`` does).
    """

    method: ClassVar[str] = "lsq"
    version: ClassVar[int] = 8

    initialization: Initialization = "mse"


@stage(LsqConfig)
@where_faster
@within_drop
def quantize(model: Model, config: LsqConfig, context: Context) -> Model:
    """Train a copy of a float model with quantizers whose scales learn, and fold its batch norms.

    Esser et al., Learned Step Size Quantization (2020). Scales start from calibration samples and get the gradient of
    `mil_cli.ops.quantize_affine` times ``1 / sqrt(N * Qp)``, N being the weights that share the scale, or the features
    of one sample, and Qp the largest code. Below 8 bits weights have one more code below 0 than above, as in the
    paper; so that folding keeps them, gammas of batch norms are made and kept positive, and where that cannot be done,
    because norms share one, codes are symmetric. Where the device wants
    one scale for a whole weight, batch norms are folded before the training, since folding gives each channel a scale
    of its own. Layers whose input was nothing but zeros in calibration stay float.

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
    context.note(initialization=config.initialization)
    insert = partial(_insert, initialization=config.initialization)
    return train_quantized(model, config, context, watcher=_ActivationStart, insert=insert)


def start_scale(mean: Tensor | float, largest_code: int) -> Tensor:
    """Return the paper's start of a scale, ``2 <|v|> / sqrt(Qp)``, from the mean magnitude of what shares it."""
    return (2 * torch.as_tensor(mean, dtype=torch.float64) / math.sqrt(largest_code)).clamp(min=SMALLEST_SCALE).float()


def _insert(
    model: Model, placement: Placement, seen: Seen[_ActivationStart], rules: Rules, initialization: Initialization
) -> None:
    """Put quantizers with trainable scales into the graph, in place, and keep the gammas positive that they need so."""
    codes, gammas = one_sided_codes(model, placement.layers, rules)
    values, narrow = (
        {node: watcher.quantizer(initialization) for node, watcher in watchers.items()}
        for watchers in (seen.values, seen.narrow)
    )

    def weight(layer: Layer) -> Quantizer:
        return _weight(model.graph, layer, codes[layer.node], rules, initialization)

    weights = once_for_each_weight(placement.layers, weight)
    insert_learned(model, placement, values, narrow, weights, gammas=gammas)


class _ActivationStart:
    """Watches an activation for the start of its scale and for its zero point, which stays."""

    def __init__(self, codes: CodeRange) -> None:
        self._codes = codes
        self._range = MeanSquaredError(codes)
        self._magnitude = MeanMagnitude()

    def update(self, values: Tensor) -> None:
        self._range.update(values)
        self._magnitude.update(values)

    def range(self) -> tuple[float, float]:
        return self._range.range()

    def quantizer(self, initialization: Initialization) -> Quantizer:
        scale, zero_point = affine_parameters(*self.range(), self._codes)
        start = torch.tensor(scale)
        if initialization == "mean" and zero_point == self._codes.quant_min:
            start = start_scale(self._magnitude.mean, self._codes.steps)
        return Quantizer(start, torch.tensor(zero_point), self._codes)


def _weight(
    graph: GraphModule, layer: Layer, codes: CodeRange, rules: Rules, initialization: Initialization
) -> Quantizer:
    axis = rules.axis(layer)
    weight: Tensor = get_attribute(graph, str(layer.weight.target)).detach()
    if initialization == "mse":
        scale = weight_scale(weight, axis=axis, codes=codes, observer="mse")
    else:
        others = [dimension for dimension in range(weight.ndim) if dimension != axis]
        mean = weight.double().abs().mean(others)
        scale = start_scale(torch.where(mean > 0, mean, mean.max()), codes.quant_max)
    return Quantizer.of_weight(scale, codes, axis)
