"""Post-training quantization with static ranges: integer weights and activations, from some calibration samples."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from mil_cli.errors import StageError
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, get_attribute, op_name
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.calibrate import calibrate
from mil_cli.stages.quantize.functional import make_functional
from mil_cli.stages.quantize.insert import QuantizerWriter
from mil_cli.stages.quantize.observers import Observer, ObserverName, make_observer
from mil_cli.stages.quantize.placement import Layer, Placement, Policy, choose_policy, place
from mil_cli.stages.quantize.ranges import CodeRange, activation_codes, affine_parameters, weight_codes
from mil_cli.stages.quantize.weights import WeightObserverName, scale_for_bias, weight_scale
from mil_cli.stages.registry import StageConfig, stage


class StaticConfig(StageConfig):
    """Settings of ``quantize/static``.

    Attributes:
        weight_bits: Bits of weights, 2 to 8.
        activation_bits: Bits of activations, 2 to 8.
        first_last_bits: Bits of the weights of layers right after an input or right before an output, if that is more
            than `weight_bits`: they are the most sensitive.
        observer: How the range of activations is found: ``min_max`` (all that was seen), ``percentile`` (outliers
            clipped), ``mse`` (smallest squared error).
        percentile: For the percentile observer, in percent.
        weight_observer: How the range of weights is found.
        calibration_samples: How many training samples are looked at, without augmentation.
        calibration_batch_size: How many of them at once.
        per_channel: Whether each output channel has a scale of its own; None: as the device says.
        activations: Unsigned or signed codes; None: as the device says.
        reduce_range: Whether 8-bit weights keep to [-64, 64]; None: as the device says.
        policy: Which values are quantized; ``auto`` decides by the graph; None: as the device says.
        skip: Layers to leave float: module paths (with all below), node names, or patterns with ``*``.
    """

    family: ClassVar[str] = "quantize"
    method: ClassVar[str] = "static"
    never_after: ClassVar[dict[str, str]] = {"quantize": "the model would hold two sets of quantizers"}

    weight_bits: int = Field(8, ge=2, le=8)
    activation_bits: int = Field(8, ge=2, le=8)
    first_last_bits: int = Field(8, ge=2, le=8)
    observer: ObserverName = "mse"
    percentile: float = Field(99.99, gt=50, le=100)
    weight_observer: WeightObserverName = "mse"
    calibration_samples: int = Field(512, ge=1)
    calibration_batch_size: int = Field(64, ge=1)
    per_channel: bool | None = None
    activations: Literal["uint8", "int8"] | None = None
    reduce_range: bool | None = None
    policy: Literal["auto", "cnn", "transformer"] | None = None
    skip: tuple[str, ...] = ()


@stage(StaticConfig)
def quantize(model: Model, config: StaticConfig, context: Context) -> Model:
    """Return `model` with its batch norms folded and quantizers in its graph.

    The result computes in float what integer kernels compute; it can be trained further, and its export holds
    integers. Post-training quantization as in Krishnamoorthi, Quantizing deep convolutional networks for efficient
    inference (2018).

    Args:
        model: A float model.
        config: The settings.
        context: Gives calibration samples and the device's rules.

    Raises:
        StageError: The model is quantized already, nothing in it can be quantized, or calibration fails.
    """
    if any(op_name(node) == "quantize_affine" for node in calls(model.graph)):
        raise StageError("the model is quantized already", hint="start from the float model")
    settings = _Settings.of(config, context)
    folded = fold_batch_norm(model)
    make_functional(folded.graph)
    policy: Policy = choose_policy(folded.graph) if settings.policy == "auto" else settings.policy
    placement = place(folded.graph, policy=policy, skip=config.skip)
    if not placement.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in placement.kept_float.items())
        raise StageError("no layer of the model can be quantized", value=reasons or "it has no layer with weights")
    ranges = _observe(folded, placement, config, settings, context)
    _insert(folded, placement, config, settings, ranges)
    context.note(
        policy=policy,
        quantized_layers=len(placement.layers),
        quantized_values=len(placement.owned),
        kept_float=placement.kept_float,
        weight_bits=config.weight_bits,
        activation_bits=config.activation_bits,
        per_channel=settings.per_channel,
        reduce_range=settings.reduce_range,
        observer=config.observer,
        calibration_samples=config.calibration_samples,
    )
    return folded


class _Settings:
    """The settings with the device's rules in place of what the recipe leaves open."""

    def __init__(
        self, *, activations: CodeRange, per_channel: bool, reduce_range: bool, policy: Literal["auto"] | Policy
    ) -> None:
        self.activations = activations
        self.per_channel = per_channel
        self.reduce_range = reduce_range
        self.policy = policy

    @classmethod
    def of(cls, config: StaticConfig, context: Context) -> _Settings:
        rules: Any = context.device.int8
        signs = rules.activations if config.activations is None else config.activations
        return cls(
            activations=activation_codes(config.activation_bits, signed=signs == "int8"),
            per_channel=rules.per_channel if config.per_channel is None else config.per_channel,
            reduce_range=rules.reduce_range if config.reduce_range is None else config.reduce_range,
            policy=rules.policy if config.policy is None else config.policy,
        )

    def weights(self, layer: Layer, config: StaticConfig) -> CodeRange:
        """Return the codes of a layer's weight."""
        bits = max(config.weight_bits, config.first_last_bits) if layer.edge else config.weight_bits
        return weight_codes(bits, reduce_range=self.reduce_range)


def _observe(
    model: Model, placement: Placement, config: StaticConfig, settings: _Settings, context: Context
) -> dict[Node, tuple[float, float]]:
    """Return the range of every value that gets a quantizer of its own, from one pass over the calibration samples."""
    observers: dict[Node, Observer] = {
        node: make_observer(config.observer, codes=settings.activations, percentile=config.percentile)
        for node in placement.owned
    }
    batches = context.calibration(samples=config.calibration_samples, batch_size=config.calibration_batch_size)
    total = -(-config.calibration_samples // config.calibration_batch_size)
    with context.progress.work("calibrating", total) as bar:
        calibrate(model.graph, observers, batches, bar=bar)
    return {node: observer.range() for node, observer in observers.items()}


def _insert(
    model: Model,
    placement: Placement,
    config: StaticConfig,
    settings: _Settings,
    ranges: dict[Node, tuple[float, float]],
) -> None:
    """Put the quantizers of all values and weights into the graph, in place."""
    writer = QuantizerWriter(model.graph)
    codes = settings.activations
    paths: dict[Node, str] = {}
    scales: dict[Node, float] = {}
    for node, (low, high) in ranges.items():
        scale, zero_point = affine_parameters(low, high, codes)
        scales[node] = scale
        paths[node] = writer.store(node.name, torch.tensor(scale), torch.tensor(zero_point))
    for layer in placement.layers:
        _insert_weight(model, writer, layer, config, settings, scales[placement.shared.get(layer.source, layer.source)])
    for node in [*placement.owned, *placement.shared]:
        path = paths[placement.shared.get(node, node)]
        readers = None if node in placement.exclusive else placement.readers[node]
        writer.insert(node, path, axis=None, codes=codes, readers=readers)
    writer.finish()


def _insert_weight(
    model: Model, writer: QuantizerWriter, layer: Layer, config: StaticConfig, settings: _Settings, input_scale: float
) -> None:
    weight = get_attribute(model.graph, str(layer.weight.target))
    bias: Tensor | None = None if layer.bias is None else get_attribute(model.graph, str(layer.bias.target))
    axis = layer.axis if settings.per_channel else None
    codes = settings.weights(layer, config)
    scale = weight_scale(weight, axis=axis, codes=codes, observer=config.weight_observer)
    scale = scale_for_bias(scale, bias, input_scale)
    path = writer.store(f"{layer.name}_weight", scale, torch.zeros(scale.shape, dtype=torch.int32))
    writer.insert(layer.weight, path, axis=axis, codes=codes, readers=[layer.node])
