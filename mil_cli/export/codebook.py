"""Turns codebook markers of an ONNX graph into packed indices that a Gather reads the weights by."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mil_cli.errors import ExportError
from mil_cli.export.exporter import LOOKUP, MARKER_DOMAIN

_PACKED_ENTRIES = 16
"""Indices below this fit into 4 bits."""


def write_codebooks(model: ir.Model, widths: Collection[int]) -> list[str]:
    """Replace every codebook marker of `model`, in place.

    The file holds the indices and the entries; onnxruntime reads the weights out once when it loads the file, so that
    the operators behind them run as those of a float model: fewer bytes on disk, no gain in time.

    Args:
        model: A model as `mil_cli.export.exporter.convert` gives it.
        widths: The bits of packed tensors that the target takes; indices take 4 where it takes them, else 8.

    Returns:
        What the user should know about how weights are stored.

    Raises:
        ExportError: A codebook or its indices are computed at run time.
    """
    markers = [node for node in model.graph if node.domain == MARKER_DOMAIN and node.op_type == LOOKUP]
    for number, node in enumerate(markers):
        _write(model.graph, node, number, widths)
    if not markers:
        return []
    if not any(node.domain == MARKER_DOMAIN for node in model.graph):
        model.opset_imports.pop(MARKER_DOMAIN, None)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    return [f"{len(markers)} weights are stored as indices into codebooks: fewer bytes on disk, no gain in time"]


def _write(graph: ir.Graph, node: ir.Node, number: int, widths: Collection[int]) -> None:
    codebook, indices = (_constant(value) for value in node.inputs)
    if codebook is None or indices is None:
        raise ExportError("a codebook or its indices are computed at run time, ONNX needs constants", value=node.name)
    groups = node.attributes["groups"].as_int()
    codebook = codebook.reshape(groups, -1)
    packed = 4 in widths and codebook.shape[1] <= _PACKED_ENTRIES
    dtype = ir.DataType.UINT4 if packed else ir.DataType.UINT8
    name = (node.inputs[1].name or "weight").removesuffix("_indices")  # type: ignore[union-attr]
    shape = indices.shape if groups == 1 else (groups, indices.size // groups)
    stored = _initializer(graph, f"{name}.indices", indices.reshape(shape), dtype)
    entries = _initializer(graph, f"{name}.entries", codebook[0] if groups == 1 else codebook, ir.DataType.FLOAT)
    cast = ir.node("Cast", [stored], {"to": int(ir.DataType.INT32)})
    nodes = [cast]
    if groups == 1:
        nodes.append(ir.node("Gather", [entries, cast.outputs[0]], {"axis": 0}))
    else:
        gather = ir.node("GatherElements", [entries, cast.outputs[0]], {"axis": 1})
        target = _initializer(graph, f"{name}.shape", np.array(indices.shape), ir.DataType.INT64)
        nodes += [gather, ir.node("Reshape", [gather.outputs[0], target])]
    for position, new in enumerate(nodes):
        graph.insert_before(node, new)
        new.outputs[0].name = f"Lookup.{number}.{position}"
        new.outputs[0].dtype = ir.DataType.INT32 if new is cast else ir.DataType.FLOAT
    ir.convenience.replace_all_uses_with(node.outputs[0], nodes[-1].outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any], dtype: ir.DataType) -> ir.Value:
    values = np.ascontiguousarray(array).astype(dtype.numpy())
    value = ir.val(name, const_value=ir.Tensor(values, dtype, name=name))
    graph.register_initializer(value)
    return value


def _constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
