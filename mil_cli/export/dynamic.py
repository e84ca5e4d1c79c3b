"""Turns products of activations that are quantized at run time into the integer form that onnxruntime fuses."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from mil_cli.export.exporter import DYNAMIC, MARKER, MARKER_DOMAIN
from mil_cli.export.markers import Marker, read_marker
from mil_cli.export.packing import storage_bits, write_codes
from mil_cli.export.surgery import GraphWriter, constant_of, transposes_second
from mil_cli.export.tables import lookups_in

_FLOAT, _INT8, _INT32, _UINT8 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.UINT8


class _Activation(NamedTuple):
    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value


def write_dynamic(onnx: GraphWriter, widths: Collection[int]) -> list[str]:
    """Replace every marker of an activation that is quantized at run time, in place, and the products that read it.

    A product with a quantized weight becomes DynamicQuantizeLinear, MatMulInteger, and factors that make floats of the
    sums; onnxruntime fuses them. The markers of their weights go; another reader gets the rounded values as floats.

    Args:
        onnx: Writes into a graph as `mil_cli.export.exporter.convert` gives it, its other quantizers not replaced yet.
        widths: The bits of packed weights that the target takes.

    Returns:
        What the user should know: nothing.

    Raises:
        ExportError: A quantizer has no form in ONNX.
    """
    known: dict[int, _Activation] = {}
    for node in [node for node in onnx.graph if node.domain == MARKER_DOMAIN and node.op_type == DYNAMIC]:
        source, output = node.inputs[0], node.outputs[0]
        if id(source) not in known:
            codes = onnx.insert(node, "DynamicQuantizeLinear", [source], {}, _UINT8, _FLOAT, _UINT8)
            known[id(source)] = _Activation(*codes.producer().outputs)  # type: ignore[union-attr]
        activation = known[id(source)]
        for product in list(output.consumers()):
            weight = _weight_of(product, output)
            if weight is not None:
                _write_product(onnx, product, activation, weight, widths)
        if output.uses() or output.is_graph_output():
            values = onnx.insert(node, "DequantizeLinear", list(activation), {}, _FLOAT)
            onnx.replace(output, values, node)
        else:
            onnx.graph.remove(node, safe=True)
    return []


class _Weight(NamedTuple):
    marker: Marker
    transposed: bool


def _weight_of(product: ir.Node, activation: ir.Value) -> _Weight | None:
    """Return the quantized matrix that a node multiplies the activation by; None if it does something else."""
    transposed = transposes_second(product)
    if transposed is None or product.inputs[0] is not activation:
        return None
    value = product.inputs[1]
    before = None if value is None else value.producer()
    if before is not None and before.op_type == "Transpose" and before.domain == "":
        transposed = not transposed
        before = before.inputs[0].producer()  # type: ignore[union-attr]
    if before is None or before.domain != MARKER_DOMAIN or before.op_type != MARKER:
        return None
    marker = read_marker(before)
    weight, columns = constant_of(marker.x), 0 if transposed else 1
    plain = weight is not None and weight.ndim == 2 and marker.axis in (None, columns, columns - 2)
    return _Weight(marker, transposed) if plain and not marker.zero_point.any() else None


def _write_product(
    onnx: GraphWriter, product: ir.Node, activation: _Activation, weight: _Weight, widths: Collection[int]
) -> None:
    marker = weight.marker
    values = constant_of(marker.x)
    if values is None:
        raise TypeError("a quantized matrix is constant")
    codes = marker.codes(values.astype(np.float32, copy=False))
    name = (marker.x.name or "weight").removesuffix(".weight")
    bits = storage_bits(marker.quant_min, marker.quant_max, widths)
    if weight.transposed and lookups_in(marker.output):  # a table is stored once, as it is looked up
        stored = write_codes(onnx, product, f"{name}.codes", codes, bits, _INT8)
        stored = onnx.insert(product, "Transpose", [stored], {"perm": [1, 0]}, _INT8)
    else:
        stored = write_codes(onnx, product, f"{name}.codes", codes.T if weight.transposed else codes, bits, _INT8)
    sums = onnx.insert(product, "MatMulInteger", [activation.codes, stored, activation.zero_point], {}, _INT32)
    result = onnx.insert(product, "Cast", [sums], {"to": int(_FLOAT)}, _FLOAT)
    steps = onnx.constant(f"{name}.scale", marker.scale, _FLOAT)
    factor = onnx.insert(product, "Mul", [activation.scale, steps], {}, _FLOAT)
    result = onnx.insert(product, "Mul", [result, factor], {}, _FLOAT)
    if len(product.inputs) == 3 and product.inputs[2] is not None:
        result = onnx.insert(product, "Add", [result, product.inputs[2]], {}, _FLOAT)
    before = product.inputs[1]
    onnx.replace(product.outputs[0], result, product)
    _remove_unread(onnx, before)


def _remove_unread(onnx: GraphWriter, value: ir.Value | None) -> None:
    """Remove a weight's transposition and marker where nobody reads them any more."""
    node = None if value is None else value.producer()
    if node is None or node.outputs[0].uses():
        return
    source = node.inputs[0]
    onnx.graph.remove(node, safe=True)
    _remove_unread(onnx, source)
