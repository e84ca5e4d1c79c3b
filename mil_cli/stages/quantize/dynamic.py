"""Dynamic quantization: integer weights, and activations whose ranges are found in each call; no samples are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from mil_cli.errors import StageError
from mil_cli.graph.fold import fold_batch_norm
from mil_cli.graph.nodes import get_attribute
from mil_cli.graph.segment import overwritten
from mil_cli.stages.quantize.describe import LayerBits
from mil_cli.stages.quantize.functional import make_functional
from mil_cli.stages.quantize.insert import QuantizerWriter, refuse_quantized
from mil_cli.stages.quantize.layers import CONVOLUTIONS, LOOK_UP, NEVER, OVERWRITTEN, FoundLayers, Layer, find_layers
from mil_cli.stages.quantize.ranges import weight_codes
from mil_cli.stages.quantize.weights import WeightObserverName, weight_scale
from mil_cli.stages.registry import StageConfig, stage

if TYPE_CHECKING:
    from torch.fx import Node

    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_SLOWER = "onnxruntime's convolutions with ranges found at run time take longer than float ones; take quantize/static"
_LEFT_OUT = {
    **NEVER,
    LOOK_UP: "a table look-up computes nothing",
    **dict.fromkeys(CONVOLUTIONS, _SLOWER),
}


class DynamicConfig(StageConfig):
    """Settings of dynamic quantization.

    Attributes:
        weight_bits: Bits of weights, 2 to 8; activations have 8.
        first_last_bits: Bits of the weights of layers right after an input or right before an output, if that is more.
        per_channel: Whether each output channel has a scale of its own; None: as the device says.
        reduce_range: Whether 8-bit weights keep to [-64, 64]; None: as the device says.
        weight_observer: How the range of weights is found.
        skip: Layers to leave float: module paths (with all below), node names, or patterns with ``*``.
    """

    family: ClassVar[str] = "quantize"
    method: ClassVar[str] = "dynamic"
    never_after: ClassVar[dict[str, str]] = {"quantize": "the model would hold two sets of quantizers"}

    weight_bits: int = Field(8, ge=2, le=8)
    first_last_bits: int = Field(8, ge=2, le=8)
    per_channel: bool | None = None
    reduce_range: bool | None = None
    weight_observer: WeightObserverName = "mse"
    skip: tuple[str, ...] = ()


@stage(DynamicConfig)
def quantize(model: Model, config: DynamicConfig, context: Context) -> Model:
    """Return `model` with the weights of its products in integers and their inputs quantized as they come.

    The form of Bhandare et al., "Efficient 8-bit quantization of Transformer neural machine language translation model"
    (2019, arXiv:1906.00532), with ranges from the values at hand instead of calibration, as PyTorch and onnxruntime
    have it. A batch's samples share one range, so that a sample's result depends a little on its neighbours.
    Convolutions stay float: onnxruntime would be slower by it.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives the device's rules.

    Raises:
        StageError: The model is quantized already, or it has no product with a weight.
    """
    refuse_quantized(model.graph)
    device = context.device.int8
    per_channel = device.per_channel if config.per_channel is None else config.per_channel
    reduce_range = device.reduce_range if config.reduce_range is None else config.reduce_range
    quantized, (layers, kept_float, _) = _found(model, config)
    graph = quantized.graph
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept_float.items())
        raise StageError("no product of the model can be quantized", value=reasons or "it has no layer with weights")
    writer = QuantizerWriter(graph)
    readers: dict[Node, list[Layer]] = {}
    for layer in layers:
        codes = weight_codes(_bits(layer, config), reduce_range=reduce_range)
        axis = layer.axis if per_channel else None
        weight = get_attribute(graph, str(layer.weight.target))
        scale = weight_scale(weight, axis=axis, codes=codes, observer=config.weight_observer)
        path = writer.store(f"{layer.name}_weight", scale, torch.zeros(scale.shape))
        writer.insert(layer.weight, path, axis=axis, codes=codes, readers=[layer.node])
        readers.setdefault(layer.source, []).append(layer)
    for value, reading in readers.items():
        writer.insert_dynamic(value, [layer.node for layer in reading])
    writer.finish()
    context.note(
        quantized_layers=len(layers),
        quantized_values=len(readers),
        kept_float=kept_float,
        weight_bits=config.weight_bits,
        first_last_bits=config.first_last_bits,
        per_channel=per_channel,
        reduce_range=reduce_range,
    )
    return quantized


def planned_bits(model: Model, config: DynamicConfig) -> LayerBits:
    """Return which bits the layers of a float model would have.

    Raises:
        StageError: A pattern of `skip` fits no layer.
    """
    found = _found(model, config)[1]
    return LayerBits({layer.node.name: (_bits(layer, config), 8) for layer in found.layers}, found.left_out)


def _found(model: Model, config: DynamicConfig) -> tuple[Model, FoundLayers]:
    """Return a folded copy of a model, and its layers."""
    folded = fold_batch_norm(model)
    make_functional(folded.graph)
    apart = dict.fromkeys(overwritten(folded.graph), OVERWRITTEN)
    return folded, find_layers(folded.graph, skip=config.skip, apart=apart, never=_LEFT_OUT)


def _bits(layer: Layer, config: DynamicConfig) -> int:
    return max(config.weight_bits, config.first_last_bits) if layer.edge else config.weight_bits
