"""Turns quantizer markers of an ONNX graph into QuantizeLinear/DequantizeLinear pairs and packed integer weights.

The forms are those that onnxruntime fuses into integer kernels: activations are quantized and dequantized in 8 bits,
8-bit weights are int8 initializers that are dequantized, weights of fewer bits are packed initializers that are cast to
int8 before (a direct 4-bit DequantizeLinear would be run at every inference). Biases stay float, and onnxruntime
quantizes them itself with the scales that it needs, but for one case (see `_Writer.quantize_bias`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch.fx import GraphModule, Node

from mil_cli.errors import ExportError
from mil_cli.export.exporter import MARKER_DOMAIN
from mil_cli.export.markers import Marker, constant_of, read_marker
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name

_PACKED = {2: (ir.DataType.INT2, 25), 4: (ir.DataType.INT4, 21), 8: (ir.DataType.INT8, 10)}
"""Bits of a weight's codes -> the type that holds them and the first opset that has it."""

_INDICES = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
"""Bits of a weight's indices into levels -> the type that holds them; the opsets are those of the codes."""

ALL_WIDTHS = (2, 4, 8)


def storage_bits(quant_min: int, quant_max: int, widths: Collection[int] = ALL_WIDTHS) -> int:
    """Return how many bits a weight's code takes in the file: the narrowest of `widths` that holds the range.

    Raises:
        ExportError: The range does not fit into 8 bits.
    """
    for bits in sorted({*widths, 8} & set(ALL_WIDTHS)):
        if -(2 ** (bits - 1)) <= quant_min and quant_max < 2 ** (bits - 1):
            return bits
    raise ExportError("weights of more than 8 bits cannot be written as integers", value=(quant_min, quant_max))


def needed_opset(graph: GraphModule, widths: Collection[int] = ALL_WIDTHS) -> int:
    """Return the lowest opset that has the packed types which the weights of a graph need."""
    return max((_PACKED[bits][1] for bits in _weight_bits(graph, widths)), default=0)


def _weight_bits(graph: GraphModule, widths: Collection[int]) -> Iterator[int]:
    for node in calls(graph):
        source = get_argument(node, "x") if op_name(node) in ("quantize_affine", "quantize_levels") else None
        if not isinstance(source, Node) or source.op != "get_attr":
            continue
        if op_name(node) == "quantize_levels":
            levels = get_attribute(graph, str(get_argument(node, "levels").target))
            yield _index_bits(len(levels), widths)
        else:
            yield storage_bits(get_argument(node, "quant_min"), get_argument(node, "quant_max"), widths)


def _index_bits(count: int, widths: Collection[int]) -> int:
    """Return how many bits an index of a level takes in the file."""
    return min(bits for bits in {*widths, 8} & {*ALL_WIDTHS} if count <= 2**bits)


def write_quantizers(model: ir.Model, widths: Collection[int] = ALL_WIDTHS) -> list[str]:
    """Replace every quantizer marker of `model`, in place.

    Args:
        model: A model as `mil_cli.export.exporter.convert` gives it.
        widths: The bits of packed weights that the target takes (of 2, 4 and 8); 8 is always allowed.

    Returns:
        What the user should know about how weights are stored.

    Raises:
        ExportError: A quantizer has no form in ONNX.
    """
    nodes = [node for node in model.graph if node.domain == MARKER_DOMAIN]
    if not nodes:
        return []
    writer = _Writer(model.graph, widths)
    for node in nodes:
        writer.write(read_marker(node))
    for node in list(model.graph):
        if _is_float_gemm(node):
            writer.quantize_bias(node)
        elif _is_float_rectifier(node):
            writer.replace_rectifier(node)
    model.opset_imports.pop(MARKER_DOMAIN, None)
    _remove_unused(model.graph)
    return writer.notices()


class _Writer:
    """Writes markers as standard nodes and keeps constants that are equal once."""

    def __init__(self, graph: ir.Graph, widths: Collection[int]) -> None:
        self._graph = graph
        self._widths = widths
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._written: dict[int, Marker] = {}
        self._widened: dict[str, int] = {}
        self._inserted = 0

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
            self._replace(marker.output, marker.x, marker.node)
            return
        unsigned = marker.quant_min >= 0
        dtype = ir.DataType.UINT8 if unsigned else ir.DataType.INT8
        limits = (0, 255) if unsigned else (-128, 127)
        if marker.quant_min < limits[0] or marker.quant_max > limits[1]:
            raise ExportError(
                "activations of more than 8 bits cannot be written as integers",
                value=(marker.quant_min, marker.quant_max),
            )
        scale = self._constant("scale", marker.scale, ir.DataType.FLOAT)
        zero_point = self._constant("zero_point", marker.zero_point, dtype)
        attributes = {} if marker.axis is None else {"axis": marker.axis}
        codes = self._insert(marker.node, "QuantizeLinear", [marker.x, scale, zero_point], attributes, dtype)
        if (marker.quant_min, marker.quant_max) != limits:
            # QuantizeLinear saturates at the type's limits; narrower codes are clipped as integers, which keeps the
            # operator before it fused.
            low = None if marker.quant_min == limits[0] else self._constant("limit", np.array(marker.quant_min), dtype)
            high = None if marker.quant_max == limits[1] else self._constant("limit", np.array(marker.quant_max), dtype)
            codes = self._insert(marker.node, "Clip", [codes, low, high], {}, dtype)
        values = self._insert(
            marker.node, "DequantizeLinear", [codes, scale, zero_point], attributes, ir.DataType.FLOAT
        )
        self._written[id(values)] = marker
        self._replace(marker.output, values, marker.node)

    def _write_weight(self, marker: Marker, weight: npt.NDArray[np.float32]) -> None:
        name = (marker.x.name or "weight").removesuffix(".weight")
        if not np.all(np.isfinite(weight)):
            raise ExportError(
                f"the weight '{marker.x.name}' holds NaN or infinity", hint="train it again or restore it"
            )
        codes = marker.codes(weight)
        count = marker.quant_max - marker.quant_min + 1
        bits = (
            storage_bits(marker.quant_min, marker.quant_max, self._widths)
            if marker.levels is None
            else _index_bits(count, self._widths)
        )
        if bits != 8 and count <= 2 ** (bits - 1):
            text = f"{count} levels stored in {bits} bits each, the narrowest packed type that ONNX has for them"
            self._widened[text] = self._widened.get(text, 0) + 1
        # Where the exporter transposes the weight, the transposed codes are stored: a Transpose between a weight and
        # its product would keep the product from being fused.
        for user in list(marker.output.consumers()):
            if user.op_type == "Transpose" and user.domain == "":
                order = user.attributes["perm"].as_ints() if "perm" in user.attributes else range(weight.ndim)[::-1]
                axis = None if marker.axis is None else list(order).index(marker.axis % weight.ndim)
                values = self._weight_values(marker, f"{name}.transposed", codes.transpose(order), axis, bits)
                self._replace(user.outputs[0], values, user)
        if marker.output.uses() or marker.output.is_graph_output():
            values = self._weight_values(marker, name, codes, marker.axis, bits)
            self._replace(marker.output, values, marker.node)
        else:
            self._graph.remove(marker.node, safe=True)

    def _weight_values(
        self, marker: Marker, name: str, codes: npt.NDArray[np.int32], axis: int | None, bits: int
    ) -> ir.Value:
        """Insert the initializer of a weight's codes and what turns it into floats; returns the floats."""
        if marker.levels is not None:
            return self._weight_levels(marker, name, codes, axis, bits)
        dtype, _ = _PACKED[bits]
        packed = self._constant(f"{name}.codes", codes, dtype)
        if bits < 8:
            packed = self._insert(marker.node, "Cast", [packed], {"to": int(ir.DataType.INT8)}, ir.DataType.INT8)
        return self._dequantize(marker, name, packed, axis)

    def _weight_levels(
        self, marker: Marker, name: str, codes: npt.NDArray[np.int32], axis: int | None, bits: int
    ) -> ir.Value:
        """Insert codes that are looked up among levels, which onnxruntime does once when it loads the file."""
        levels: Any = marker.levels
        if not np.array_equal(levels, np.clip(np.rint(levels), -128, 127)):
            raise ExportError("levels of weights are no whole numbers of 8 bits", value=marker.x.name)
        packed = self._constant(f"{name}.codes", codes, _INDICES[bits])
        indices = self._insert(marker.node, "Cast", [packed], {"to": int(ir.DataType.INT32)}, ir.DataType.INT32)
        table = self._constant(f"{name}.levels", levels, ir.DataType.INT8)
        chosen = self._insert(marker.node, "Gather", [table, indices], {"axis": 0}, ir.DataType.INT8)
        return self._dequantize(marker, name, chosen, axis)

    def _dequantize(self, marker: Marker, name: str, codes: ir.Value, axis: int | None) -> ir.Value:
        inputs: list[ir.Value | None] = [codes, self._constant(f"{name}.scale", marker.scale, ir.DataType.FLOAT)]
        inputs.append(self._constant(f"{name}.zero_point", marker.zero_point, ir.DataType.INT8))
        attributes = {} if axis is None else {"axis": axis}
        return self._insert(marker.node, "DequantizeLinear", inputs, attributes, ir.DataType.FLOAT)

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
            self._constant(f"{name}.bias.codes", codes, ir.DataType.INT32),
            self._constant(f"{name}.bias.scale", scale, ir.DataType.FLOAT),
        ]
        attributes = {"axis": 0} if scale.ndim else {}
        gemm.replace_input_with(2, self._insert(gemm, "DequantizeLinear", inputs, attributes, ir.DataType.FLOAT))

    def replace_rectifier(self, relu: ir.Node) -> None:
        """Write a rectifier between an integer product and a float operator as a maximum with 0.

        onnxruntime looks through a Relu for the QuantizeLinear behind it; where there is none, it leaves the product in
        float.
        """
        zero = self._constant("zero", np.array(0.0), ir.DataType.FLOAT)
        self._replace(relu.outputs[0], self._insert(relu, "Max", [relu.inputs[0], zero], {}, ir.DataType.FLOAT), relu)

    def _insert(
        self, before: ir.Node, op: str, inputs: list[ir.Value | None], attributes: dict[str, int], dtype: ir.DataType
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        self._graph.insert_before(before, node)
        output = node.outputs[0]
        output.name = f"{op}.{self._inserted}"
        self._inserted += 1
        output.dtype = dtype
        return output

    def _constant(self, name: str, array: npt.NDArray[Any], dtype: ir.DataType) -> ir.Value:
        """Return an initializer of these values, the same one for the same values."""
        values = np.ascontiguousarray(array).reshape(array.shape).astype(dtype.numpy())
        key = (dtype.name, values.shape, values.tobytes())
        if key not in self._constants:
            unique, number = name, 0
            while unique in self._graph.initializers:
                number += 1
                unique = f"{name}.{number}"
            value = ir.val(unique, const_value=ir.Tensor(values, dtype, name=unique))
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def _replace(self, old: ir.Value, new: ir.Value, node: ir.Node) -> None:
        """Let `new` take the place of `old`, the output of `node`, which is removed."""
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)


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


def _remove_unused(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
