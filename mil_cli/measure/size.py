"""Bytes of the files that a model ships as."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from mil_cli.errors import MeasureError


def size_bytes(file: Path) -> int:
    """Return the bytes of an ONNX file and of the files with external weights that it names.

    Raises:
        MeasureError: A file is missing, or it is no ONNX file.
    """
    if not file.is_file():
        raise MeasureError("there is no such file", where=str(file), hint="check the path")
    try:
        model = onnx.load(file, load_external_data=False)
    except DecodeError as error:
        raise MeasureError(f"this is no ONNX file: {error}", where=str(file), hint="export the model again") from None
    total = file.stat().st_size
    for location in sorted(set(_locations(model.graph, model.functions))):
        beside = file.parent / location
        if not beside.is_file():
            hint = "copy it beside the .onnx file: both belong together"
            raise MeasureError(f"its file of weights {location} is missing", where=str(file), hint=hint)
        total += beside.stat().st_size
    return total


def _locations(graph: onnx.GraphProto, functions: object = ()) -> Iterator[str]:
    tensors = [*graph.initializer]
    for sparse in graph.sparse_initializer:
        tensors += [sparse.values, sparse.indices]
    nodes = [*graph.node]
    for function in functions:  # type: ignore[attr-defined]
        nodes.extend(function.node)
    for node in nodes:
        for attribute in node.attribute:
            tensors += [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _locations(inner)
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield from (entry.value for entry in tensor.external_data if entry.key == "location")
