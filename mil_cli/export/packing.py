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
"""Bits of a weight's indices into levels -> the type that holds them; the opsets are those of the codes."""

_THREE_BITS_OPSET = 18
"""The first opset with BitwiseAnd. ONNX has no type of 3 bits: eight codes lie in three bytes."""

ALL_WIDTHS = (2, 3, 4, 8)
_OF_WEIGHTS = ("quantize_affine", "quantize_blocks", "quantize_levels")


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
    """Return the lowest opset that has what the weights of a graph are packed by."""
    used = set(_weight_bits(graph, widths))
    return max((_THREE_BITS_OPSET if bits == 3 else _PACKED[bits][1] for bits in used), default=0)


def _weight_bits(graph: GraphModule, widths: Collection[int]) -> Iterator[int]:
    for node in calls(graph):
        source = get_argument(node, "x") if op_name(node) in _OF_WEIGHTS else None
        if not isinstance(source, Node) or source.op != "get_attr":
            continue
        if op_name(node) == "quantize_levels":
            levels = get_attribute(graph, str(get_argument(node, "levels").target))
            yield index_bits(len(levels), widths)
        else:
            yield storage_bits(get_argument(node, "quant_min"), get_argument(node, "quant_max"), widths)


def index_bits(count: int, widths: Collection[int]) -> int:
    """Return how many bits an index of a level takes in the file."""
    return min(bits for bits in {*widths, 8} & {*_INDICES} if count <= 2**bits)


def write_indices(onnx: GraphWriter, before: ir.Node, name: str, codes: npt.NDArray[np.int32], bits: int) -> ir.Value:
    """Insert the initializer of a weight's indices into levels; returns them as int32."""
    stored = onnx.constant(name, codes, _INDICES[bits])
    return onnx.insert(before, "Cast", [stored], {"to": int(ir.DataType.INT32)}, ir.DataType.INT32)


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


def _write_three_bits(
    onnx: GraphWriter, before: ir.Node, name: str, codes: npt.NDArray[np.int32], dtype: ir.DataType
) -> ir.Value:
    """Write eight codes as three bytes, one for each bit; shifts, a mask and a product make numbers of them."""
    byte, real = ir.DataType.UINT8, ir.DataType.FLOAT
    value: ir.Value = onnx.constant(name, pack_three_bits(codes), byte)
    shifts = onnx.constant("shifts", np.arange(8)[:, None], byte)
    value = onnx.insert(before, "BitShift", [value, shifts], {"direction": "RIGHT"}, byte)
    value = onnx.insert(before, "BitwiseAnd", [value, onnx.constant("bit", np.array(1), byte)], {}, byte)
    value = onnx.insert(before, "Cast", [value], {"to": int(real)}, real)
    value = onnx.insert(before, "MatMul", [value, onnx.constant("bit_values", np.array([1, 2, -4]), real)], {}, real)
    if dtype != real:
        value = onnx.insert(before, "Cast", [value], {"to": int(dtype)}, dtype)
    if codes.size % 8:
        value = onnx.reshape(before, value, [-1], dtype)
        ends = [onnx.constant("bound", np.array([number]), ir.DataType.INT64) for number in (0, codes.size)]
        value = onnx.insert(before, "Slice", [value, *ends], {}, dtype)
    return onnx.reshape(before, value, codes.shape, dtype)


def pack_three_bits(codes: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Return codes of [-4, 3] as bytes ``[codes / 8, 1, 3]``: of eight codes the lowest bits, the middle, the highest.

    A byte's lowest bit belongs to the first code. The highest bit of a code counts -4.
    """
    flat = codes.reshape(-1)
    eights = np.pad(flat, (0, -len(flat) % 8)).reshape(-1, 1, 8)
    bits = eights[..., None, :] >> np.arange(3)[:, None] & 1
    return np.packbits(bits.astype(np.uint8), axis=-1, bitorder="little")[..., 0]
