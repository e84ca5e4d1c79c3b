"""Writes look-ups in tables of integers: only the rows that are looked up become floats.

A table takes a byte for each number in memory. Floats of the whole table would take four, and at the peak, while they
are made, thrice the float model's memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from mil_cli.export.surgery import GraphWriter

_FLOAT, _INT8 = ir.DataType.FLOAT, ir.DataType.INT8


def lookups_in(table: ir.Value) -> list[ir.Node]:
    """Return the nodes that look rows up in a value, along its first axis."""
    return [node for node in table.consumers() if node.op_type == "Gather" and _takes_rows(node, table)]


def _takes_rows(node: ir.Node, table: ir.Value) -> bool:
    axis = node.attributes.get("axis")
    return node.domain == "" and node.inputs[0] is table and (axis is None or axis.as_int() == 0)


def write_lookups(
    onnx: GraphWriter,
    looks: Sequence[ir.Node],
    codes: ir.Value,
    steps: ir.Value,
    *,
    by_row: bool = True,
    flatten: bool = False,
) -> None:
    """Let look-ups read codes, and multiply what they find by its steps.

    Args:
        onnx: Writes the nodes.
        looks: The look-ups, as `lookups_in` gives them; they are replaced.
        codes: INT8 ``[rows, columns]``, or in blocks ``[rows, blocks, columns of each]``.
        steps: FLOAT ``[rows, 1]``, or ``[rows, blocks, 1]``; without `by_row` ``[]``.
        by_row: Whether rows have steps of their own.
        flatten: Whether there are blocks, which what was found loses again. The ranks of indices must be known.
    """
    for look in looks:
        indices = look.inputs[1]
        found = onnx.insert(look, "Gather", [codes, indices], {"axis": 0}, _INT8)
        value = onnx.insert(look, "Cast", [found], {"to": int(_FLOAT)}, _FLOAT)
        factors = onnx.insert(look, "Gather", [steps, indices], {"axis": 0}, _FLOAT) if by_row else steps
        value = onnx.insert(look, "Mul", [value, factors], {}, _FLOAT)
        if flatten:
            kept = [0] * len(indices.shape)  # type: ignore[union-attr, arg-type]
            value = onnx.reshape(look, value, (*kept, -1), _FLOAT)
        onnx.replace(look.outputs[0], value, look)
