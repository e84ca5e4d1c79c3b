"""Keeps layers in float that the graph has in float, where onnxruntime would round their weights by itself.

A convolution or Gemm between a DequantizeLinear and a QuantizeLinear whose weight is a float constant gets an int8
weight when onnxruntime loads the file, with one scale for the whole of it (its pass WeightBiasQuantization): what was
left float because it is sensitive loses most there, as a depthwise convolution does. It does so only behind a scale
that is one number. A scale for each channel, all of them the same, says the same and is left alone.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx_ir as ir

from mil_cli.export.surgery import GraphWriter, constant_of, dequantizer_of, transposes_second

_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm"})
_PASSING = frozenset({"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Flatten"})
"""Operators that give values of their input, which onnxruntime moves quantizers across."""


def keep_float_layers(onnx: GraphWriter) -> None:
    """Give the float layers that read quantized values scales by channel, in place; no value changes.

    Args:
        onnx: Writes into a graph whose quantizers are written.
    """
    for node in list(onnx.graph):
        if node.domain == "" and node.op_type in _LAYERS and dequantizer_of(node.inputs[1]) is None:
            source = _quantized(node.inputs[0])
            if source is not None:
                _read_by_channel(onnx, node, source)


def _quantized(value: ir.Value | None) -> ir.Node | None:
    """Return the DequantizeLinear, of one scale, that a value has its values from; None if there is none."""
    while value is not None and (node := value.producer()) is not None and node.op_type in _PASSING:
        value = node.inputs[0]
    source = dequantizer_of(value)
    scale = None if source is None else constant_of(source.inputs[1])
    return source if scale is not None and scale.size == 1 else None


def _read_by_channel(onnx: GraphWriter, layer: ir.Node, source: ir.Node) -> None:
    """Let a layer read its input through a DequantizeLinear of its own, with a scale for each channel."""
    channels = _input_channels(layer)
    if channels is None:
        return
    value, scale, zero_point = (cast("ir.Value", each) for each in source.inputs)
    dtype = cast("ir.DataType", zero_point.dtype)
    if layer.inputs[0] is not source.outputs[0]:
        value = onnx.insert(layer, "QuantizeLinear", [layer.inputs[0], scale, zero_point], {}, dtype)
    scales, zero_points = (
        onnx.constant(f"{each.name}.channels", np.full(channels, constant_of(each)), cast("ir.DataType", each.dtype))
        for each in (scale, zero_point)
    )
    inputs: list[ir.Value | None] = [value, scales, zero_points]
    layer.replace_input_with(0, onnx.insert(layer, "DequantizeLinear", inputs, {"axis": 1}, ir.DataType.FLOAT))


def _input_channels(layer: ir.Node) -> int | None:
    """Return how many channels a layer reads, along axis 1; None if its weight is computed at run time."""
    weight = constant_of(layer.inputs[1])
    if weight is None:
        return None
    if layer.op_type == "Conv":
        groups = layer.attributes["group"].as_int() if "group" in layer.attributes else 1
        return int(weight.shape[1]) * groups
    return int(weight.shape[-1] if transposes_second(layer) else weight.shape[0])
