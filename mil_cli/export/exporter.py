"""Runs torch's ONNX exporter quietly; every quantizer and codebook of the graph comes out as one marker node."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch.export import ExportedProgram

MARKER_DOMAIN = "mil.marker"
"""The domain of nodes that stand for quantizers and codebooks until `mil_cli.export.qdq` and `mil_cli.export.codebook`
replace them; no file holds one."""

MARKER = "QuantizeAffine"
LEVELS_MARKER = "QuantizeLevels"
LOOKUP = "Lookup"


def convert(program: ExportedProgram, *, opset: int) -> ir.Model:
    """Convert an exported program to an ONNX model in memory.

    A ``mil::quantize_affine`` becomes a node ``mil.marker::QuantizeAffine(x, scale, zero_point)`` with the attributes
    ``axis`` (absent: per tensor), ``quant_min`` and ``quant_max``; a ``mil::quantize_levels`` becomes
    ``mil.marker::QuantizeLevels(x, scale, levels)`` with the attribute ``axis``; a ``mil::lookup`` becomes
    ``mil.marker::Lookup(codebook, indices)`` with the attribute ``groups``. The exporter folds constants and fuses
    operators but does not know markers, so it cannot fold what they mark.

    Raises:
        torch.onnx.OnnxExporterError: An operator has no translation, say.
    """
    _order_attention(program)
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=_translations(),
            verbose=False,
        )
    if exported is None:
        raise TypeError("the exporter gave no program")
    return exported.model


def _order_attention(program: ExportedProgram) -> None:
    """Copy every attention result into plain order of memory, in place; in ONNX the copy is nothing.

    The exporter chooses views by how the fused kernel lays out its result, and only then takes attention apart into
    products that lay it out otherwise, where those views are not possible.
    """
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        with graph.inserting_after(node):
            ordered = graph.call_function(
                torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
            )
        ordered.meta = dict(node.meta)
        node.replace_all_uses_with(ordered, delete_user_cb=lambda user, made=ordered: user is not made)
    program.graph_module.recompile()


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    marker = onnxscript.values.Op(onnxscript.values.Opset(MARKER_DOMAIN, 1), MARKER, _marker_schema())

    def quantize_affine(x: Any, scale: Any, zero_point: Any, axis: int | None, quant_min: int, quant_max: int) -> Any:
        attributes: Mapping[str, int] = {} if axis is None else {"axis": axis}
        return marker(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max, **attributes)

    levels_marker = onnxscript.values.Op(onnxscript.values.Opset(MARKER_DOMAIN, 1), LEVELS_MARKER, _levels_schema())

    def quantize_levels(x: Any, scale: Any, levels: Any, axis: int | None) -> Any:
        attributes: Mapping[str, int] = {} if axis is None else {"axis": axis}
        return levels_marker(x, scale, levels, **attributes)

    lookup_marker = onnxscript.values.Op(onnxscript.values.Opset(MARKER_DOMAIN, 1), LOOKUP, _lookup_schema())

    def lookup(codebook: Any, indices: Any, groups: int) -> Any:
        return lookup_marker(codebook, indices, groups=groups)

    return {
        torch.ops.mil.quantize_affine.default: quantize_affine,
        torch.ops.mil.quantize_levels.default: quantize_levels,
        torch.ops.mil.lookup.default: lookup,
    }


def _lookup_schema() -> onnx.defs.OpSchema:
    parameter = onnx.defs.OpSchema.FormalParameter
    return onnx.defs.OpSchema(
        LOOKUP,
        MARKER_DOMAIN,
        1,
        inputs=[parameter("codebook", "tensor(float)"), parameter("indices", "tensor(uint8)")],
        outputs=[parameter("weight", "tensor(float)")],
        attributes=[onnx.defs.OpSchema.Attribute("groups", onnx.defs.OpSchema.AttrType.INT, required=True)],
    )


def _levels_schema() -> onnx.defs.OpSchema:
    parameter = onnx.defs.OpSchema.FormalParameter
    return onnx.defs.OpSchema(
        LEVELS_MARKER,
        MARKER_DOMAIN,
        1,
        inputs=[parameter(name, "tensor(float)") for name in ("x", "scale", "levels")],
        outputs=[parameter("y", "tensor(float)")],
        attributes=[onnx.defs.OpSchema.Attribute("axis", onnx.defs.OpSchema.AttrType.INT, required=False)],
    )


def _marker_schema() -> onnx.defs.OpSchema:
    schema = onnx.defs.OpSchema
    parameter, attribute = schema.FormalParameter, schema.Attribute
    return schema(
        MARKER,
        MARKER_DOMAIN,
        1,
        inputs=[
            parameter("x", "tensor(float)"),
            parameter("scale", "tensor(float)"),
            parameter("zero_point", "tensor(int32)"),
        ],
        outputs=[parameter("y", "tensor(float)")],
        attributes=[
            attribute("axis", schema.AttrType.INT, required=False),
            attribute("quant_min", schema.AttrType.INT, required=True),
            attribute("quant_max", schema.AttrType.INT, required=True),
        ],
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints, log lines and warnings from the user; what matters reaches them as an error."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
