"""Gives an ONNX model the names and axes of a model's specification, and strips what tells of its making."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
from onnx_ir.tensor_adapters import from_torch_dtype

from mil_cli.errors import ExportError
from mil_cli.graph.spec import ModelSpec, TensorSpec


def apply_interface(model: ir.Model, spec: ModelSpec) -> None:
    """Rename the inputs and outputs of `model` to those of `spec`, with its dynamic axes, in place.

    Raises:
        ExportError: The exported graph does not take or give the tensors of the specification.
    """
    graph = model.graph
    _make_outputs_distinct(graph)
    _check(graph.inputs, spec.inputs, "inputs")
    _check(graph.outputs, spec.outputs, "outputs")
    wanted = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    if len(wanted) != len(spec.inputs) + len(spec.outputs):
        names = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
        raise ExportError("an ONNX file needs a different name for each input and output", value=names)
    _free_names(graph, wanted)
    for value, tensor in zip((*graph.inputs, *graph.outputs), (*spec.inputs, *spec.outputs), strict=True):
        value.name = tensor.name
        value.shape = ir.Shape([tensor.dynamic.get(axis, size) for axis, size in enumerate(tensor.shape)])


def strip_metadata(model: ir.Model) -> None:
    """Remove stack traces, paths and module names, in place.

    The exporter writes about 55 kB of them into the file of a ResNet-20.
    """
    model.doc_string = None
    model.metadata_props.clear()
    model.meta.clear()
    graph = model.graph
    graph.name = "model"
    graph.doc_string = None
    graph.metadata_props.clear()
    for function in model.functions.values():
        function.doc_string = None
        function.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        _strip_value(value)
    for index, node in enumerate(ir.traversal.RecursiveGraphIterator(graph)):
        node.doc_string = None
        node.metadata_props.clear()
        node.name = f"{node.op_type}_{index}"
        for value in node.outputs:
            _strip_value(value)


def _strip_value(value: ir.Value) -> None:
    value.doc_string = None
    value.metadata_props.clear()
    if value.const_value is not None:
        value.const_value.doc_string = None
        value.const_value.metadata_props.clear()


def _make_outputs_distinct(graph: ir.Graph) -> None:
    """Put an Identity before an output that is also an input, a constant or another output: each has its own name."""
    taken = {id(value) for value in graph.inputs}
    for index, value in enumerate(graph.outputs):
        if id(value) in taken or value.is_initializer():
            node = ir.Node("", "Identity", [value])
            node.outputs[0].type = value.type
            node.outputs[0].shape = value.shape
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
        taken.add(id(graph.outputs[index]))


def _check(values: Sequence[ir.Value], tensors: Sequence[TensorSpec], what: str) -> None:
    if len(values) != len(tensors):
        found = [value.name for value in values]
        expected = [tensor.name for tensor in tensors]
        raise ExportError(f"the exported graph has other {what} than the model ({expected})", value=found)
    for value, tensor in zip(values, tensors, strict=True):
        dtype = from_torch_dtype(tensor.torch_dtype)
        if value.dtype is not None and value.dtype != dtype:
            raise ExportError(f"'{tensor.name}' is exported as {value.dtype.name}, the model has {tensor.dtype}")
        if value.shape is not None and len(value.shape) != len(tensor.shape):
            raise ExportError(
                f"'{tensor.name}' is exported with shape {value.shape}, the model has {list(tensor.shape)}"
            )


def _free_names(graph: ir.Graph, wanted: Iterable[str]) -> None:
    """Rename inner values that hold a name which an input or output is to have."""
    wanted = set(wanted)
    outer = {id(value) for value in (*graph.inputs, *graph.outputs)}
    values = [value for node in ir.traversal.RecursiveGraphIterator(graph) for value in node.outputs]
    values += list(graph.initializers.values())
    taken = {value.name for value in values} | wanted
    for value in values:
        if id(value) not in outer and value.name in wanted:
            number = 1
            while f"{value.name}_inner_{number}" in taken:
                number += 1
            value.name = f"{value.name}_inner_{number}"
            taken.add(value.name)
    for index, value in enumerate((*graph.inputs, *graph.outputs)):
        value.name = f"mil.interface.{index}"
