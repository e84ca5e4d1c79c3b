"""Turns quantizer markers of an ONNX graph into QuantizeLinear/DequantizeLinear pairs and packed integer weights.

The forms are those that onnxruntime fuses into integer kernels: activations are quantized and dequantized in 8 bits,
8-bit weights are int8 initializers that are dequantized, weights of fewer bits are packed initializers that become int8
before (a direct 4-bit DequantizeLinear would be run at every inference). Rows of tables are looked up as int8, and
become floats then. Biases stay float, and onnxruntime quantizes them itself with the scales that it needs, but for one
case (see `_Writer.quantize_bias`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mil_cli.errors import ExportError
from mil_cli.export.exporter import MARKER_DOMAIN
from mil_cli.export.markers import Marker, read_marker
from mil_cli.export.packing import ALL_WIDTHS, index_bits, storage_bits, write_codes, write_indices
from mil_cli.export.surgery import GraphWriter, constant_of
from mil_cli.export.tables import lookups_in, write_lookups


def write_quantizers(onnx: GraphWriter, widths: Collection[int] = ALL_WIDTHS) -> list[str]:
    """Replace every quantizer marker of a graph, in place.

    Args:
        onnx: Writes into a graph as `mil_cli.export.exporter.convert` gives it.
        widths: The bits of packed weights that the target takes (of 2, 3, 4 and 8); 8 is always allowed.

    Returns:
        What the user should know about how weights are stored.

    Raises:
        ExportError: A quantizer has no form in ONNX.
    """
    nodes = [node for node in onnx.graph if node.domain == MARKER_DOMAIN]
    if not nodes:
        return []
    writer = _Writer(onnx, widths)
    for node in nodes:
        writer.write(read_marker(node))
    for node in list(onnx.graph):
        if _is_float_gemm(node):
            writer.quantize_bias(node)
        elif _is_float_rectifier(node):
            writer.replace_rectifier(node)
    return writer.notices()


class _Writer:
    """Writes markers as standard nodes."""

    def __init__(self, onnx: GraphWriter, widths: Collection[int]) -> None:
        self._onnx = onnx
        self._widths = widths
        self._written: dict[int, Marker] = {}
        self._widened: dict[str, int] = {}

    def write(self, marker: Marker) -> None:
        weight = constant_of(marker.x)
        if weight is not None:
            self._write_weight(marker, weight.astype(np.float32, copy=False))
        else:
            self._write_activation(marker)

    def notices(self) -> list[str]:
        return [f"{count} weight{'s' if count > 1 else ''}: {text}" for text, count in self._widened.items()]

    def _write_activation(self, marker: Marker) -> None:
        previous = self._written.get(id(marker.x))
        if previous is not None and previous.same_codes(marker):
            self._onnx.replace(marker.output, marker.x, marker.node)
            return
        unsigned = marker.quant_min >= 0
        dtype = ir.DataType.UINT8 if unsigned else ir.DataType.INT8
        limits = (0, 255) if unsigned else (-128, 127)
        if marker.quant_min < limits[0] or marker.quant_max > limits[1]:
            raise ExportError(
                "activations of more than 8 bits cannot be written as integers",
                value=(marker.quant_min, marker.quant_max),
            )
        scale = self._onnx.constant("scale", marker.scale, ir.DataType.FLOAT)
        zero_point = self._onnx.constant("zero_point", marker.zero_point, dtype)
        attributes = {} if marker.axis is None else {"axis": marker.axis}
        codes = self._onnx.insert(marker.node, "QuantizeLinear", [marker.x, scale, zero_point], attributes, dtype)
        if (marker.quant_min, marker.quant_max) != limits:
            # QuantizeLinear saturates at the type's limits; narrower codes are clipped as integers, which keeps the
            # operator before it fused.
            bounds: list[ir.Value | None] = [
                None if bound == limit else self._onnx.constant("limit", np.array(bound), dtype)
                for bound, limit in zip((marker.quant_min, marker.quant_max), limits, strict=True)
            ]
            codes = self._onnx.insert(marker.node, "Clip", [codes, *bounds], {}, dtype)
        values = self._onnx.insert(
            marker.node, "DequantizeLinear", [codes, scale, zero_point], attributes, ir.DataType.FLOAT
        )
        self._written[id(values)] = marker
        self._onnx.replace(marker.output, values, marker.node)

    def _write_weight(self, marker: Marker, weight: npt.NDArray[np.float32]) -> None:
        name = (marker.x.name or "weight").removesuffix(".weight")
        codes = marker.codes(weight)
        count = marker.quant_max - marker.quant_min + 1
        bits = (
            storage_bits(marker.quant_min, marker.quant_max, self._widths)
            if marker.levels is None
            else index_bits(count, self._widths)
        )
        if count <= 2 ** (bits - 1):
            text = f"{count} levels stored in {bits} bits each, the narrowest form of the target that holds them"
            self._widened[text] = self._widened.get(text, 0) + 1
        users = list(marker.output.consumers())
        turns = [user for user in users if user.op_type == "Transpose" and user.domain == ""]
        # Codes that are read as they are, too, are stored but once; onnxruntime transposes them when it loads the file.
        once = len(users) > len(turns) or marker.output.is_graph_output()
        stored = self._integers(marker, name, codes, bits) if once else None
        for user in turns:
            self._write_transposed(marker, name, user, stored, codes, bits)
        if stored is not None:
            self._write_lookups(marker, name, stored)
            if marker.output.uses() or marker.output.is_graph_output():
                values = self._dequantize(marker, name, stored, marker.axis)
                self._onnx.replace(marker.output, values, marker.node)
                return
        self._onnx.graph.remove(marker.node, safe=True)

    def _write_transposed(
        self, marker: Marker, name: str, user: ir.Node, stored: ir.Value | None, codes: npt.NDArray[np.int32], bits: int
    ) -> None:
        """Write a weight as the exporter transposes it, in a node that is replaced.

        It is the codes that are transposed: a Transpose between a weight and its product would keep the product from
        being fused.
        """
        order = user.attributes["perm"].as_ints() if "perm" in user.attributes else range(codes.ndim)[::-1]
        axis = None if marker.axis is None else list(order).index(marker.axis % codes.ndim)
        if stored is None:
            turned = self._integers(marker, f"{name}.transposed", codes.transpose(order), bits)
        else:
            turned = self._onnx.insert(marker.node, "Transpose", [stored], {"perm": list(order)}, ir.DataType.INT8)
        self._onnx.replace(user.outputs[0], self._dequantize(marker, name, turned, axis), user)

    def _integers(self, marker: Marker, name: str, codes: npt.NDArray[np.int32], bits: int) -> ir.Value:
        """Insert the initializer of a weight's codes and what turns it into int8; returns that."""
        if marker.levels is None:
            return write_codes(self._onnx, marker.node, f"{name}.codes", codes, bits, ir.DataType.INT8)
        levels: Any = marker.levels  # looked up once, when onnxruntime loads the file
        if not np.array_equal(levels, np.clip(np.rint(levels), -128, 127)):
            raise ExportError("levels of weights are no whole numbers of 8 bits", value=marker.x.name)
        indices = write_indices(self._onnx, marker.node, f"{name}.codes", codes, bits)
        table = self._onnx.constant(f"{name}.levels", levels, ir.DataType.INT8)
        return self._onnx.insert(marker.node, "Gather", [table, indices], {"axis": 0}, ir.DataType.INT8)

    def _write_lookups(self, marker: Marker, name: str, codes: ir.Value) -> None:
        """Let what looks rows up in a weight read the codes."""
        plain = marker.x.shape is not None and len(marker.x.shape) == 2 and not marker.zero_point.any()
        looks = lookups_in(marker.output) if plain and marker.axis in (None, 0, -2) else []
        if not looks:
            return
        steps = self._onnx.constant(f"{name}.scale", marker.scale, ir.DataType.FLOAT)
        by_row = marker.axis is not None
        if by_row:
            steps = self._onnx.reshape(marker.node, steps, (-1, 1), ir.DataType.FLOAT)
        write_lookups(self._onnx, looks, codes, steps, by_row=by_row)

    def _dequantize(self, marker: Marker, name: str, codes: ir.Value, axis: int | None) -> ir.Value:
        scale = self._onnx.constant(f"{name}.scale", marker.scale, ir.DataType.FLOAT)
        zero_point = self._onnx.constant(f"{name}.zero_point", marker.zero_point, ir.DataType.INT8)
        attributes = {} if axis is None else {"axis": axis}
        inputs: list[ir.Value | None] = [codes, scale, zero_point]
        return self._onnx.insert(marker.node, "DequantizeLinear", inputs, attributes, ir.DataType.FLOAT)

    def quantize_bias(self, gemm: ir.Node) -> None:
        """Write the bias of a Gemm of quantized values as int32, in steps of both scales' product.

        onnxruntime quantizes a float bias itself, but for a Gemm only if its result is quantized too.
        """
        bias = gemm.inputs[2]
        scales = [_scale_of(value) for value in gemm.inputs[:2]]
        values = None if bias is None else constant_of(bias)
        if bias is None or values is None or values.ndim != 1 or scales[0] is None or scales[1] is None:
            return
        scale = (scales[0] * scales[1]).astype(np.float32)
        limits = np.iinfo(np.int32)
        codes = np.clip(np.rint(values.astype(np.float64) / scale), limits.min, limits.max)
        name = (bias.name or "bias").removesuffix(".bias")
        inputs: list[ir.Value | None] = [
            self._onnx.constant(f"{name}.bias.codes", codes, ir.DataType.INT32),
            self._onnx.constant(f"{name}.bias.scale", scale, ir.DataType.FLOAT),
        ]
        attributes = {"axis": 0} if scale.ndim else {}
        gemm.replace_input_with(2, self._onnx.insert(gemm, "DequantizeLinear", inputs, attributes, ir.DataType.FLOAT))

    def replace_rectifier(self, relu: ir.Node) -> None:
        """Write a rectifier between an integer product and a float operator as a maximum with 0.

        onnxruntime looks through a Relu for the QuantizeLinear behind it; where there is none, it leaves the product in
        float.
        """
        zero = self._onnx.constant("zero", np.array(0.0), ir.DataType.FLOAT)
        largest = self._onnx.insert(relu, "Max", [relu.inputs[0], zero], {}, ir.DataType.FLOAT)
        self._onnx.replace(relu.outputs[0], largest, relu)


def _scale_of(value: ir.Value | None) -> npt.NDArray[np.float32] | None:
    """Return the scale of a value that a DequantizeLinear makes."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[1] is None:
        return None
    scale = constant_of(node.inputs[1])
    return None if scale is None else scale.astype(np.float32)


def _is_float_gemm(node: ir.Node) -> bool:
    """Whether a node is a linear layer with a bias whose result nobody quantizes at once."""
    if node.op_type != "Gemm" or node.domain != "" or len(node.inputs) != 3:
        return False
    if any(node.attributes[name].value != 1.0 for name in ("alpha", "beta") if name in node.attributes):
        return False
    user = _only_user(node)
    if user is not None and user.op_type in ("Relu", "Clip"):
        user = _only_user(user)
    return user is None or user.op_type != "QuantizeLinear"


def _is_float_rectifier(node: ir.Node) -> bool:
    """Whether a node rectifies the product of quantized values and nobody quantizes the result at once."""
    product = node.inputs[0].producer() if node.op_type == "Relu" and node.inputs[0] is not None else None
    if product is None or product.op_type not in ("MatMul", "Gemm"):
        return False
    user = _only_user(node)
    return all(_scale_of(value) is not None for value in product.inputs[:2]) and (
        user is None or user.op_type != "QuantizeLinear"
    )


def _only_user(node: ir.Node) -> ir.Node | None:
    """Return the one node that reads a node's first output; None if there are more, or none."""
    users = list(node.outputs[0].consumers())
    return users[0] if len(users) == 1 else None
