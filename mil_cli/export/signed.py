"""Keeps files with signed activations loadable where their codes are moved about and then read as floats.

On x86 onnxruntime 1.32 moves a DequantizeLinear behind what passes values on, gives the QuantizeLinear that it puts
before it the type of the codes, and then makes unsigned codes of signed ones without a change of that type: the file
cannot be loaded. Where the pair stands already it adds none.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mil_cli.export.surgery import GraphWriter, constant_of

_MOVED_BEHIND = frozenset({"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice"})
"""Operators whose outputs are values of their first input, behind which onnxruntime moves a DequantizeLinear."""


def pair_moved_codes(onnx: GraphWriter) -> None:
    """Quantize what passes signed codes on to floats, by the same scale, in place; no value changes.

    Args:
        onnx: Writes into a graph whose quantizers are written.
    """
    for node in list(onnx.graph):
        if node.op_type == "DequantizeLinear" and _is_signed(node) and constant_of(node.inputs[0]) is None:
            _pair(onnx, node)


def _is_signed(dequantize: ir.Node) -> bool:
    zero_point = constant_of(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    return zero_point is not None and zero_point.dtype == np.int8 and zero_point.size == 1


def _pair(onnx: GraphWriter, dequantize: ir.Node) -> None:
    """Put a pair behind what moves a value, and behind what moves that one in turn."""
    _, scale, zero_point = dequantize.inputs
    pending = [dequantize.outputs[0]]
    while pending:
        value = pending.pop()
        for mover in list(value.consumers()):
            if mover.op_type not in _MOVED_BEHIND or mover.inputs[0] is not value or not _is_read_as_floats(mover):
                continue
            moved = onnx.insert(mover, mover.op_type, list(mover.inputs), mover.attributes, ir.DataType.FLOAT)
            codes = onnx.insert(mover, "QuantizeLinear", [moved, scale, zero_point], {}, ir.DataType.INT8)
            floats = onnx.insert(mover, "DequantizeLinear", [codes, scale, zero_point], {}, ir.DataType.FLOAT)
            for user, place in list(mover.outputs[0].uses()):
                if user.op_type == "QuantizeLinear":
                    user.replace_input_with(place, moved)
            onnx.replace(mover.outputs[0], floats, mover)
            pending.append(floats)


def _is_read_as_floats(node: ir.Node) -> bool:
    output = node.outputs[0]
    return output.is_graph_output() or any(user.op_type != "QuantizeLinear" for user in output.consumers())
