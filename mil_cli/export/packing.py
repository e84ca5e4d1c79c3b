"""How the integer codes of weights lie in a file, in 2, 3, 4 or 8 bits each, and what reads them out when it is loaded.

onnxruntime folds what reads them into constants, so that kernels see the same int8 or float weights for every width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch.fx import GraphModule, Node

from mil_cli.errors import ExportError
from mil_cli.export.surgery import GraphWriter
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name

_PACKED = {2: (ir.DataType.INT2, 25), 4: (ir.DataType.INT4, 21), 8: (ir.DataType.INT8, 10)}
"""Bits of a weight's codes -> the type that holds them and the first opset that has it."""

_INDICES = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
"""Bits of indices into levels or a codebook -> the type that holds them; the opsets are those of the codes."""

_THREE_BITS_OPSET = 11
"""The first opset with BitShift. ONNX has no type of 3 bits: eight codes lie in three bytes."""

_PAIRS_OF_BYTES = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [-64, 0, 0, 1], [0, -64, 0, 4], [0, 0, -64, 16]])
"""What makes the numbers of four pairs of three bytes and of the high two bits of each, as a product.

No two terms add up to more than 16 bits, in which some processors have the sums of their products of bytes.
"""

_CODES_OF_PAIRS = np.stack([(np.arange(64) >> place & 7 ^ 4) - 4 for place in (0, 3)], axis=1)
"""The two codes of each pair's number, shape (64, 2)."""

ALL_WIDTHS = (2, 3, 4, 8)
_WIDEST = 64
_OF_WEIGHTS = {"quantize_affine": "x", "quantize_blocks": "x", "quantize_levels": "x", "lookup": "codebook"}
"""Operators that read weights -> the argument that is one, or the values that it takes."""


def storage_bits(quant_min: int, quant_max: int, widths: Collection[int] = ALL_WIDTHS) -> int:
    """Return how many bits a weight's code takes in the file: the narrowest of `widths` that holds the range.

    Raises:
        ExportError: The range does not fit into 8 bits.
    """
    for bits in sorted({*widths, 8} & set(ALL_WIDTHS)):
        if -(2 ** (bits - 1)) <= quant_min and quant_max < 2 ** (bits - 1):
            return bits
    raise ExportError("weights of more than 8 bits cannot be written as integers", value=(quant_min, quant_max))


def widening(quant_min: int, quant_max: int) -> int:
    """Return the power of two that kernels see a weight's codes multiplied by, and that its scale is divided by.

    Integer kernels add the bias as int32, in steps of the input's scale times the weight's. With few bits on both sides
    such a step is large, and a bias would lose as much as weights do. Multiplied codes say the same in smaller steps.
    They keep to 7 bits, which holds for devices with a reduced range too.
    """
    factor = 1
    while 2 * factor * max(abs(quant_min), abs(quant_max)) <= _WIDEST:
        factor *= 2
    return factor


def needed_opset(graph: GraphModule, widths: Collection[int] = ALL_WIDTHS) -> int:
    """Return the lowest opset that has what the weights of a graph are packed by."""
    used = set(_weight_bits(graph, widths))
    return max((_THREE_BITS_OPSET if bits == 3 else _PACKED[bits][1] for bits in used), default=0)


def _weight_bits(graph: GraphModule, widths: Collection[int]) -> Iterator[int]:
    for node in calls(graph):
        source = get_argument(node, _OF_WEIGHTS[name]) if (name := op_name(node)) in _OF_WEIGHTS else None
        if not isinstance(source, Node) or source.op != "get_attr":
            continue
        if name == "lookup":
            yield index_bits(len(get_attribute(graph, str(source.target))) // get_argument(node, "groups"), widths)
        elif name == "quantize_levels":
            levels = get_attribute(graph, str(get_argument(node, "levels").target))
            yield index_bits(len(levels), widths)
        else:
            yield storage_bits(get_argument(node, "quant_min"), get_argument(node, "quant_max"), widths)


def index_bits(count: int, widths: Collection[int]) -> int:
    """Return how many bits an index of so many levels or entries takes in the file."""
    return min(bits for bits in {*widths, 8} & {*_INDICES} if count <= 2**bits)


def index_type(count: int, widths: Collection[int]) -> ir.DataType:
    """Return the type that holds indices below a number in the file."""
    return _INDICES[index_bits(count, widths)]


def write_levels(
    onnx: GraphWriter,
    before: ir.Node,
    name: str,
    codes: npt.NDArray[np.int32],
    bits: int,
    levels: npt.NDArray[np.float32],
) -> ir.Value:
    """Insert the initializer of a weight's indices into levels and what looks them up, as INT8; returns that."""
    stored = onnx.constant(f"{name}.codes", codes, _INDICES[bits])
    return _look_up(onnx, before, onnx.constant(f"{name}.levels", levels, ir.DataType.INT8), stored)


def _look_up(onnx: GraphWriter, before: ir.Node, table: ir.Value, stored: ir.Value) -> ir.Value:
    """Insert what takes entries of a table, once, when onnxruntime loads the file; negative ones count from its end."""
    indices = onnx.insert(before, "Cast", [stored], {"to": int(ir.DataType.INT32)}, ir.DataType.INT32)
    return onnx.insert(before, "Gather", [table, indices], {"axis": 0}, ir.DataType.INT8)


def write_codes(
    onnx: GraphWriter, before: ir.Node, name: str, codes: npt.NDArray[np.int32], bits: int, dtype: ir.DataType
) -> ir.Value:
    """Insert the initializer of a weight's codes and what reads it out.

    Args:
        onnx: Writes the nodes.
        before: The node that comes next.
        name: The initializer's name.
        codes: Signed codes that fit into `bits`, in the shape in which they are read.
        bits: 2, 3, 4 or 8.
        dtype: INT8 or FLOAT.

    Returns:
        The codes as values of `dtype`.
    """
    if bits == 3:
        return _write_three_bits(onnx, before, name, codes, dtype)
    stored = onnx.constant(name, codes, _PACKED[bits][0])
    if _PACKED[bits][0] == dtype:
        return stored
    return onnx.insert(before, "Cast", [stored], {"to": int(dtype)}, dtype)


class Multiplied:
    """Writes codes that kernels see multiplied, as INT8; tables of products are shared by the weights of a file.

    Args:
        onnx: Writes the nodes.
    """

    def __init__(self, onnx: GraphWriter) -> None:
        self._onnx = onnx
        self._tables: dict[tuple[int, int], ir.Value] = {}

    def write(self, before: ir.Node, name: str, codes: npt.NDArray[np.int32], bits: int, factor: int) -> ir.Value:
        """Insert the initializer of a weight's codes and what reads them out times a factor; returns that.

        Args:
            before: The node that comes next.
            name: The initializer's name.
            codes: Signed codes that fit into `bits`, in the shape in which they are read.
            bits: 2, 3, 4 or 8.
            factor: As `widening` gives it.
        """
        if bits == 8:
            return write_codes(self._onnx, before, name, codes * factor, bits, ir.DataType.INT8)
        if bits == 3:
            return _write_three_bits(self._onnx, before, name, codes, ir.DataType.INT8, factor)
        if factor == 1:
            return write_codes(self._onnx, before, name, codes, bits, ir.DataType.INT8)
        if (bits, factor) not in self._tables:
            half = 2 ** (bits - 1)
            wrapped = np.roll(np.arange(-half, half), half)  # entries of negative codes are counted from the end
            products = np.clip(factor * wrapped, -128, 127)  # what is cut off are codes that the weight does not have
            self._tables[bits, factor] = self._onnx.constant("products", products, ir.DataType.INT8)
        stored = self._onnx.constant(name, codes, _PACKED[bits][0])
        return _look_up(self._onnx, before, self._tables[bits, factor], stored)


def _write_three_bits(
    onnx: GraphWriter, before: ir.Node, name: str, codes: npt.NDArray[np.int32], dtype: ir.DataType, factor: int = 1
) -> ir.Value:
    """Write eight codes as three bytes, and what looks them up two by two in a table of the 64 pairs.

    What onnxruntime makes on the way, all of a file's weights at once, takes few bytes a weight: numbers of the pairs
    and not of the codes, and one product for the numbers of all pairs.
    """
    byte = ir.DataType.UINT8
    packed: ir.Value = onnx.constant(name, pack_three_bits(codes), byte)
    high = onnx.insert(
        before, "BitShift", [packed, onnx.constant("six", np.array(6), byte)], {"direction": "RIGHT"}, byte
    )
    both = onnx.insert(before, "Concat", [packed, high], {"axis": 1}, byte)
    numbers = onnx.constant("pairs", _PAIRS_OF_BYTES, ir.DataType.INT8)
    pairs = onnx.insert(before, "MatMulInteger", [both, numbers], {}, ir.DataType.INT32)
    products = np.clip(factor * _CODES_OF_PAIRS, -128, 127)  # what is cut off are codes that the weight does not have
    table = onnx.constant("codes", products, dtype)
    value = onnx.insert(before, "Gather", [table, pairs], {"axis": 0}, dtype)
    if codes.size % 8:
        value = onnx.reshape(before, value, [-1], dtype)
        ends = [onnx.constant("bound", np.array([number]), ir.DataType.INT64) for number in (0, codes.size)]
        value = onnx.insert(before, "Slice", [value, *ends], {}, dtype)
    return onnx.reshape(before, value, codes.shape, dtype)


def pack_three_bits(codes: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Return codes of [-4, 3] as bytes ``[codes / 8, 3]``.

    Of two codes, as numbers of 3 bits, the first is the low half of a pair's number. Eight codes make four pairs: the
    low six bits of each byte are one of the first three, and the high two bits of all make the fourth, lowest first.
    """
    flat = codes.reshape(-1)
    unsigned = (np.pad(flat, (0, -len(flat) % 8)) & 7).reshape(-1, 4, 2)
    pairs = unsigned[..., 0] | unsigned[..., 1] << 3
    high = pairs[:, 3:] >> np.array([0, 2, 4]) & 3
    packed: npt.NDArray[np.uint8] = (pairs[:, :3] | high << 6).astype(np.uint8)
    return packed
