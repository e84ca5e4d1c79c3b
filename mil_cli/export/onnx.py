"""Writes a model as one ONNX file that takes the place of its baseline's without a change."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import torch

from mil_cli.errors import ExportError
from mil_cli.export.blocks import write_blocks
from mil_cli.export.codebook import write_codebooks
from mil_cli.export.dynamic import write_dynamic
from mil_cli.export.exporter import MARKER_DOMAIN, convert
from mil_cli.export.interface import apply_interface, strip_metadata
from mil_cli.export.markers import merge_markers
from mil_cli.export.packing import ALL_WIDTHS, needed_opset
from mil_cli.export.qdq import write_quantizers
from mil_cli.export.surgery import GraphWriter, remove_unused
from mil_cli.files import writing
from mil_cli.graph.model import Model

if TYPE_CHECKING:
    from mil_cli.device.profile import DeviceProfile

OPSET = 21
"""The default opset: the first with 4-bit tensors, so that a float baseline and its 4-bit result share it."""

_LARGEST_FILE = 2**31 - 2**20
"""Bytes of tensors that one ONNX file can hold: protobuf's limit, less room for the graph."""


@dataclass(frozen=True)
class ExportedFile:
    """An ONNX file that was written.

    Attributes:
        path: Where it is.
        input_names: Names of its inputs, in order.
        output_names: Names of its outputs, in order.
        opset: The version of ONNX's operators that it uses.
        notices: What the user should know about it.
    """

    path: Path
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    opset: int
    notices: tuple[str, ...] = ()


def export_onnx(model: Model, path: Path, *, device: DeviceProfile | None = None) -> ExportedFile:
    """Write a float or quantized model as ONNX.

    Quantizers become QuantizeLinear/DequantizeLinear pairs (DynamicQuantizeLinear where ranges are found at run time),
    quantized weights become packed integer tensors. Inputs and outputs have the names, dtypes, shapes and dynamic axes
    of the model's specification. The file holds no stack traces and no paths, and exporting the same model again gives
    the same bytes. It is checked with ONNX's own checker and appears under its name only when it is complete.

    Args:
        model: The model; it is not changed.
        path: The file to write.
        device: The target; its weight widths decide which packed types may be used, its execution provider which
            operators beyond ONNX's own. None allows all.

    Raises:
        ExportError: The model cannot be expressed in ONNX, or the file would not be valid.
        OutputError: The file cannot be written.
    """
    program = model.export_program()
    widths = ALL_WIDTHS if device is None else device.weight_bits
    opset = max(OPSET, needed_opset(model.graph, widths))
    try:
        converted = convert(program, opset=opset)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(
            f"the model cannot be written as ONNX: {_root_cause(error)}",
            hint="replace the operator that it names in the model's code by one that ONNX knows",
        ) from error
    merge_markers(converted.graph)
    # Dynamic products come before the quantizers, whose marker on their weights they take over.
    graph = GraphWriter(converted.graph)
    blocks = partial(write_blocks, provider=None if device is None else device.provider)
    writers = (write_codebooks, blocks, write_dynamic, write_quantizers)
    notices = [notice for write in writers for notice in write(graph, widths)]
    converted.opset_imports.pop(MARKER_DOMAIN, None)
    remove_unused(converted.graph)
    apply_interface(converted, model.spec)
    strip_metadata(converted)
    converted.producer_name = "mil"
    converted.producer_version = None
    _write(converted, path)
    return ExportedFile(
        path=path,
        input_names=tuple(tensor.name for tensor in model.spec.inputs),
        output_names=tuple(tensor.name for tensor in model.spec.outputs),
        opset=converted.opset_imports[""],
        notices=tuple(notices),
    )


def _write(model: ir.Model, path: Path) -> None:
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > _LARGEST_FILE:
        raise ExportError(
            "the model's weights do not fit into one ONNX file (2 GiB)",
            value=f"{size / 2**30:.1f} GiB",
            hint="prune or quantize it first",
        )
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # inferred shapes, in the exporter's own symbols: every reader infers them again
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
    with writing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))


def _root_cause(error: BaseException) -> str:
    """Return the first line of the innermost message of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
