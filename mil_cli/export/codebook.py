"""Turns codebook markers of an ONNX graph into packed indices that a Gather reads the weights by."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from mil_cli.errors import ExportError
from mil_cli.export.exporter import LOOKUP, MARKER_DOMAIN
from mil_cli.export.packing import index_type
from mil_cli.export.surgery import GraphWriter, constant_of


def write_codebooks(onnx: GraphWriter, widths: Collection[int]) -> list[str]:
    """Replace every codebook marker of a graph, in place.

    The file holds the indices and the entries; onnxruntime reads the weights out once when it loads the file, so that
    the operators behind them run as those of a float model: fewer bytes on disk, no gain in time.

    Args:
        onnx: Writes into a graph as `mil_cli.export.exporter.convert` gives it.
        widths: The bits of packed tensors that the target takes; indices take 2 or 4 where they fit, else 8.

    Returns:
        What the user should know about how weights are stored.

    Raises:
        ExportError: A codebook or its indices are computed at run time.
    """
    markers = [node for node in onnx.graph if node.domain == MARKER_DOMAIN and node.op_type == LOOKUP]
    for node in markers:
        _write(onnx, node, widths)
    if not markers:
        return []
    return [f"{len(markers)} weights are stored as indices into codebooks: fewer bytes on disk, no gain in time"]


def _write(onnx: GraphWriter, node: ir.Node, widths: Collection[int]) -> None:
    codebook, indices = (constant_of(value) for value in node.inputs)
    if codebook is None or indices is None:
        raise ExportError("a codebook or its indices are computed at run time, ONNX needs constants", value=node.name)
    groups = node.attributes["groups"].as_int()
    codebook = codebook.reshape(groups, -1)
    name = (node.inputs[1].name or "weight").removesuffix("_indices")  # type: ignore[union-attr]
    shape = indices.shape if groups == 1 else (groups, indices.size // groups)
    stored = onnx.constant(f"{name}.indices", indices.reshape(shape), index_type(codebook.shape[1], widths))
    entries = onnx.constant(f"{name}.entries", codebook[0] if groups == 1 else codebook, ir.DataType.FLOAT)
    numbers = onnx.insert(node, "Cast", [stored], {"to": int(ir.DataType.INT32)}, ir.DataType.INT32)
    if groups == 1:
        weight = onnx.insert(node, "Gather", [entries, numbers], {"axis": 0}, ir.DataType.FLOAT)
    else:
        gathered = onnx.insert(node, "GatherElements", [entries, numbers], {"axis": 1}, ir.DataType.FLOAT)
        target = onnx.constant(f"{name}.shape", np.array(indices.shape), ir.DataType.INT64)
        weight = onnx.insert(node, "Reshape", [gathered, target], {}, ir.DataType.FLOAT)
    onnx.replace(node.outputs[0], weight, node)
