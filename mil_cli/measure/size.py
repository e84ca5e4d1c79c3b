"""Bytes of the files that a model ships as, as they are and zipped."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from mil_cli.errors import MeasureError

_BLOCK = 2**20


def size_bytes(file: Path) -> int:
    """Return the bytes of an ONNX file and of the files with external weights that it names.

    Raises:
        MeasureError: A file is missing, or it is no ONNX file.
    """
    return sum(part.stat().st_size for part in _files(file))


def zipped_bytes(file: Path) -> int:
    """Return the bytes that the same files take as zip archives and package managers compress them (deflate, level 6).

    Weights on few values, and those that are zero, show here alone.

    Raises:
        MeasureError: A file is missing, or it is no ONNX file.
    """
    total = 0
    for part in _files(file):
        compressor = zlib.compressobj(6)
        with part.open("rb") as stream:
            while block := stream.read(_BLOCK):
                total += len(compressor.compress(block))
        total += len(compressor.flush())
    return total


def _files(file: Path) -> list[Path]:
    """Return an ONNX file and the files with external weights that it names."""
    if not file.is_file():
        raise MeasureError("there is no such file", where=str(file), hint="check the path")
    try:
        model = onnx.load(file, load_external_data=False)
    except DecodeError as error:
        raise MeasureError(f"this is no ONNX file: {error}", where=str(file), hint="export the model again") from None
    files = [file]
    for location in sorted(set(_locations(model.graph, model.functions))):
        beside = file.parent / location
        if not beside.is_file():
            hint = "copy it beside the .onnx file: both belong together"
            raise MeasureError(f"its file of weights {location} is missing", where=str(file), hint=hint)
        files.append(beside)
    return files


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
