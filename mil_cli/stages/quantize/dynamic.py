"""Dynamic quantization: integer weights, and activations whose ranges are found in each call; no samples are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mil_cli.errors import StageError
from mil_cli.graph.functional import make_functional
from mil_cli.graph.nodes import get_attribute
from mil_cli.graph.segment import overwritten
from mil_cli.stages.quantize.accuracy import within_drop_by_skipping
from mil_cli.stages.quantize.describe import LayerBits
from mil_cli.stages.quantize.holding import BoundedConfig
from mil_cli.stages.quantize.insert import Quantizer, QuantizerWriter, refuse_quantized
from mil_cli.stages.quantize.layers import (
    CONVOLUTIONS,
    NEVER,
    OVERWRITTEN,
    FoundLayers,
    Layer,
    find_layers,
    left_float,
    once_for_each_weight,
)
from mil_cli.stages.quantize.ranges import weight_codes
from mil_cli.stages.quantize.settle import fold_weights
from mil_cli.stages.quantize.weights import WeightObserverName, weight_scale
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from torch.fx import Node

    from mil_cli.device.profile import Int8Form
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_SLOWER = "onnxruntime's convolutions with ranges found at run time take longer than float ones; take quantize/static"
_LEFT_OUT = {**NEVER, **dict.fromkeys(CONVOLUTIONS, _SLOWER)}


class DynamicConfig(BoundedConfig):
    """Settings of dynamic quantization.

    Attributes:
        weight_bits: Bits of weights, 2 to 8; activations have 8.
        first_last_bits: Bits of the weights of layers right after an input or right before an output, if that is more;
            None: as the device says.
        embeddings: Whether tables of embeddings are quantized too, in `weight_bits`, each row with a scale of its own;
            None: as the device says.
        per_channel: Whether each output channel has a scale of its own; None: as the device says.
        reduce_range: Whether 8-bit weights keep to [-64, 64]; None: as the device says.
        weight_observer: How the range of weights is found.
    """

    family: ClassVar[str] = "quantize"
    method: ClassVar[str] = "dynamic"
    version: ClassVar[int] = 3
    never_after: ClassVar[dict[str, str]] = {"quantize": "the model would hold two sets of quantizers"}

    weight_bits: int = Field(8, ge=2, le=8)
    first_last_bits: int | None = Field(None, ge=2, le=8)
    embeddings: bool | None = None
    per_channel: bool | None = None
    reduce_range: bool | None = None
    weight_observer: WeightObserverName = "mse"


def _products(model: Model, config: DynamicConfig, context: Context) -> list[str]:
    """Return the names of the layers whose products would be quantized."""
    layers = _found(model, config, context.device.int8)[1].layers
    return [layer.name for layer in layers if not layer.looks_up]


@stage(DynamicConfig)
@within_drop_by_skipping(_products)
def quantize(model: Model, config: DynamicConfig, context: Context) -> Model:
    """Return `model` with the weights of its products in integers and their inputs quantized as they come.

    The form of Bhandare et al., "Efficient 8-bit quantization of Transformer neural machine language translation model"
    (2019, arXiv:1906.00532), with ranges from the values at hand instead of calibration, as PyTorch and onnxruntime
    have it. A batch's samples share one range, so that a sample's result depends a little on its neighbours.
    Convolutions stay float: onnxruntime would be slower by it.

    Args:
        model: A float model; not changed.
        config: The settings.
        context: Gives the device's rules; for `max_drop` val.

    Raises:
        StageError: The model is quantized already, or it has no product with a weight.
    """
    refuse_quantized(model.graph)
    device = context.device.int8
    per_channel = device.per_channel if config.per_channel is None else config.per_channel
    reduce_range = device.reduce_range if config.reduce_range is None else config.reduce_range
    quantized, (layers, kept_float, _) = _found(model, config, device)
    graph = quantized.graph
    products = [layer for layer in layers if not layer.looks_up]
    if not products:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept_float.items())
        raise StageError("no product of the model can be quantized", value=reasons or "it has no layer with weights")

    def form(layer: Layer) -> Quantizer:
        only_table = all(each.looks_up for each in layer.sharing)
        codes = weight_codes(_bits(layer, config, device), reduce_range=reduce_range and not only_table)
        axis = layer.axis if per_channel or only_table else None
        weight = get_attribute(graph, str(layer.weight.target))
        return Quantizer.of_weight(
            weight_scale(weight, axis=axis, codes=codes, observer=config.weight_observer), codes, axis
        )

    writer = QuantizerWriter(graph)
    writer.insert_weights(layers, once_for_each_weight(layers, form))
    readers: dict[Node, list[Layer]] = {}
    for layer in products:
        readers.setdefault(layer.source, []).append(layer)
    for value, reading in readers.items():
        writer.insert_dynamic(value, [layer.node for layer in reading])
    writer.finish()
    context.note(
        quantized_layers=len(products),
        quantized_tables=len(layers) - len(products),
        quantized_values=len(readers),
        kept_float=kept_float,
        weight_bits=config.weight_bits,
        first_last_bits=_edge_bits(config, device),
        per_channel=per_channel,
        reduce_range=reduce_range,
    )
    return quantized


def planned_bits(model: Model, config: DynamicConfig, device: Int8Form) -> LayerBits:
    """Return which bits the layers of a float model would have on a device.

    Raises:
        StageError: A pattern of `skip` fits no layer.
    """
    found = _found(model, config, device)[1]
    bits = {layer.node.name: (_bits(layer, config, device), None if layer.looks_up else 8) for layer in found.layers}
    return LayerBits(bits, found.left_out)


def _found(model: Model, config: DynamicConfig, device: Int8Form) -> tuple[Model, FoundLayers]:
    """Return a folded copy of a model, and its layers."""
    folded = fold_weights(model)
    make_functional(folded.graph)
    apart = dict.fromkeys(overwritten(folded.graph), OVERWRITTEN)
    tables = device.embeddings if config.embeddings is None else config.embeddings
    never = left_float(device, tables=tables, never=_LEFT_OUT)
    return folded, find_layers(folded.graph, skip=config.skip, apart=apart, never=never)


def _bits(layer: Layer, config: DynamicConfig, device: Int8Form) -> int:
    edge = any(each.edge for each in layer.sharing)
    return max(config.weight_bits, _edge_bits(config, device)) if edge else config.weight_bits


def _edge_bits(config: DynamicConfig, device: Int8Form) -> int:
    return device.first_last_bits if config.first_last_bits is None else config.first_last_bits
