"""Turns quantizer markers of an ONNX graph into QuantizeLinear/DequantizeLinear pairs and packed integer weights.

The forms are those that onnxruntime fuses into integer kernels: activations are quantized and dequantized in 8 bits,
8-bit weights are int8 initializers that are dequantized, weights of fewer bits are packed initializers that become
int8 before, multiplied (a direct 4-bit DequantizeLinear would be run at every inference). Rows of tables are looked
up as int8, and become floats then. Biases stay float, and onnxruntime quantizes them itself with the scales that it
needs, but for one case (see `mil_cli.export.gemm`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mil_cli.errors import ExportError
from mil_cli.export.exporter import MARKER_DOMAIN
from mil_cli.export.float_layers import keep_float_layers
from mil_cli.export.gemm import finish_products
from mil_cli.export.markers import Marker, read_marker
from mil_cli.export.packing import ALL_WIDTHS, Multiplied, index_bits, storage_bits, widening, write_levels
from mil_cli.export.signed import pair_moved_codes
from mil_cli.export.surgery import GraphWriter, constant_of
from mil_cli.export.tables import lookups_in, write_lookups

_FLOATS = np.finfo(np.float32).min, np.finfo(np.float32).max


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
    finish_products(onnx)
    keep_float_layers(onnx)
    pair_moved_codes(onnx)
    return writer.notices()


def _before_clip(marker: Marker) -> tuple[ir.Value, int, int]:
    """Return what an activation's quantizer may read and its smallest and largest code, without the Clip before it.

    Rounding keeps the order, so that codes can be clipped in place of values. onnxruntime drops a Clip by itself only
    where it cuts nothing off the 8 bits; any other keeps the layer before it, whose output it is, in float.
    """
    whole = marker.x, marker.quant_min, marker.quant_max
    clip = marker.x.producer()
    if clip is None or (clip.domain, clip.op_type) != ("", "Clip") or marker.axis is not None:
        return whole
    if len(list(marker.x.uses())) > 1 or marker.x.is_graph_output() or clip.inputs[0] is None:
        return whole
    codes = [marker.quant_min, marker.quant_max]
    for place, bound in enumerate(clip.inputs[1:]):
        if bound is not None:
            value = constant_of(bound)
            if value is None:
                return whole
            finite = np.clip(value.astype(np.float32), *_FLOATS)  # a bound of infinity is none
            codes[place] = int(marker.codes(finite).item())
    return clip.inputs[0], codes[0], codes[1]


def _activation_type(marker: Marker) -> tuple[ir.DataType, tuple[int, int]]:
    """Return the type of an activation's codes, and its limits.

    Raises:
        ExportError: The codes do not fit into 8 bits.
    """
    unsigned = marker.quant_min >= 0
    limits = (0, 255) if unsigned else (-128, 127)
    if marker.quant_min < limits[0] or marker.quant_max > limits[1]:
        raise ExportError(
            "activations of more than 8 bits cannot be written as integers", value=(marker.quant_min, marker.quant_max)
        )
    return ir.DataType.UINT8 if unsigned else ir.DataType.INT8, limits


def _factor(weight: Marker) -> int:
    """Return what the codes or levels of a weight are multiplied by for kernels; 1 where none reads it."""
    looked_up = len(lookups_in(weight.output)) == len(list(weight.output.consumers()))
    if weight.zero_point.any() or looked_up:
        return 1
    if weight.levels is not None:
        return widening(int(weight.levels.min()), int(weight.levels.max()))
    return widening(weight.quant_min, weight.quant_max)


class _Writer:
    """Writes markers as standard nodes."""

    def __init__(self, onnx: GraphWriter, widths: Collection[int]) -> None:
        self._onnx = onnx
        self._widths = widths
        self._written: dict[int, Marker] = {}
        self._widened: dict[str, int] = {}
        self._multiplied = Multiplied(onnx)

    def write(self, marker: Marker) -> None:
        constant = constant_of(marker.x)
        if constant is None:
            self._write_activation(marker)
        elif marker.levels is None and marker.quant_min >= 0:
            self._write_constant(marker, constant.astype(np.float32, copy=False))
        else:
            self._write_weight(marker, constant.astype(np.float32, copy=False))

    def notices(self) -> list[str]:
        return [f"{count} weight{'s' if count > 1 else ''}: {text}" for text, count in self._widened.items()]

    def _write_activation(self, marker: Marker) -> None:
        previous = self._written.get(id(marker.x))
        if previous is not None and previous.same_codes(marker):
            self._onnx.replace(marker.output, marker.x, marker.node)
            return
        dtype, limits = _activation_type(marker)
        scale = self._onnx.constant("scale", marker.scale, ir.DataType.FLOAT)
        zero_point = self._onnx.constant("zero_point", marker.zero_point, dtype)
        attributes = {} if marker.axis is None else {"axis": marker.axis}
        x, least, most = _before_clip(marker)
        codes = self._onnx.insert(marker.node, "QuantizeLinear", [x, scale, zero_point], attributes, dtype)
        if (least, most) != limits:
            # QuantizeLinear saturates at the type's limits; narrower codes are clipped as integers, which keeps the
            # operator before it fused.
            bounds: list[ir.Value | None] = [
                None if bound == limit else self._onnx.constant("limit", np.array(bound), dtype)
                for bound, limit in zip((least, most), limits, strict=True)
            ]
            codes = self._onnx.insert(marker.node, "Clip", [codes, *bounds], {}, dtype)
        values = self._onnx.insert(
            marker.node, "DequantizeLinear", [codes, scale, zero_point], attributes, ir.DataType.FLOAT
        )
        self._written[id(values)] = marker
        self._onnx.replace(marker.output, values, marker.node)
        clip = marker.x.producer()
        if clip is not None and x is not marker.x:
            self._onnx.graph.remove(clip, safe=True)

    def _write_constant(self, marker: Marker, values: npt.NDArray[np.float32]) -> None:
        """Write an activation that is always the same, positions or queries that were learned say, as its codes."""
        dtype, _ = _activation_type(marker)
        codes = self._onnx.constant(f"{marker.x.name}.codes", marker.codes(values), dtype)
        found = self._dequantize(marker, marker.x.name or "constant", codes, marker.axis, dtype)
        self._onnx.replace(marker.output, found, marker.node)

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
        factor = _factor(marker)
        users = list(marker.output.consumers())
        turns = [user for user in users if user.op_type == "Transpose" and user.domain == ""]
        # Codes that are read as they are, too, are stored but once; onnxruntime transposes them when it loads the file.
        once = len(users) > len(turns) or marker.output.is_graph_output()
        stored = self._integers(marker, name, codes, bits, factor) if once else None
        for user in turns:
            self._write_transposed(marker, name, user, stored, codes, bits, factor)
        if stored is not None:
            self._write_lookups(marker, name, stored, factor)
            if marker.output.uses() or marker.output.is_graph_output():
                values = self._dequantize(marker, name, stored, marker.axis, factor=factor)
                self._onnx.replace(marker.output, values, marker.node)
                return
        self._onnx.graph.remove(marker.node, safe=True)

    def _write_transposed(
        self,
        marker: Marker,
        name: str,
        user: ir.Node,
        stored: ir.Value | None,
        codes: npt.NDArray[np.int32],
        bits: int,
        factor: int,
    ) -> None:
        """Write a weight as the exporter transposes it, in a node that is replaced.

        It is the codes that are transposed: a Transpose between a weight and its product would keep the product from
        being fused.
        """
        order = user.attributes["perm"].as_ints() if "perm" in user.attributes else range(codes.ndim)[::-1]
        axis = None if marker.axis is None else list(order).index(marker.axis % codes.ndim)
        if stored is None:
            turned = self._integers(marker, f"{name}.transposed", codes.transpose(order), bits, factor)
        else:
            turned = self._onnx.insert(marker.node, "Transpose", [stored], {"perm": list(order)}, ir.DataType.INT8)
        values = self._dequantize(marker, name, turned, axis, factor=factor)
        self._onnx.replace(user.outputs[0], values, user)

    def _integers(self, marker: Marker, name: str, codes: npt.NDArray[np.int32], bits: int, factor: int) -> ir.Value:
        """Insert the initializer of a weight's codes and what turns it into int8; returns that."""
        if marker.levels is None:
            return self._multiplied.write(marker.node, f"{name}.codes", codes, bits, factor)
        levels: Any = marker.levels
        if not np.array_equal(levels, np.clip(np.rint(levels), -128, 127)):
            raise ExportError("levels of weights are no whole numbers of 8 bits", value=marker.x.name)
        return write_levels(self._onnx, marker.node, name, codes, bits, levels * factor)

    def _write_lookups(self, marker: Marker, name: str, codes: ir.Value, factor: int) -> None:
        """Let what looks rows up in a weight read the codes."""
        plain = marker.x.shape is not None and len(marker.x.shape) == 2 and not marker.zero_point.any()
        looks = lookups_in(marker.output) if plain and marker.axis in (None, 0, -2) else []
        if not looks:
            return
        steps = self._onnx.constant(f"{name}.scale", marker.scale / factor, ir.DataType.FLOAT)
        by_row = marker.axis is not None
        if by_row:
            steps = self._onnx.reshape(marker.node, steps, (-1, 1), ir.DataType.FLOAT)
        write_lookups(self._onnx, looks, codes, steps, by_row=by_row)

    def _dequantize(
        self,
        marker: Marker,
        name: str,
        codes: ir.Value,
        axis: int | None,
        dtype: ir.DataType = ir.DataType.INT8,
        *,
        factor: int = 1,
    ) -> ir.Value:
        scale = self._onnx.constant(f"{name}.scale", marker.scale / factor, ir.DataType.FLOAT)
        zero_point = self._onnx.constant(f"{name}.zero_point", marker.zero_point, dtype)
        attributes = {} if axis is None else {"axis": axis}
        inputs: list[ir.Value | None] = [codes, scale, zero_point]
        return self._onnx.insert(marker.node, "DequantizeLinear", inputs, attributes, ir.DataType.FLOAT)
