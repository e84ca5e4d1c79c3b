"""Runs torch's ONNX exporter quietly; every quantizer and codebook of the graph comes out as one marker node."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch.export import ExportedProgram
from torch.onnx._internal.exporter._registration import ONNXRegistry

from mil_cli.export.attention import rewrite_attention

MARKER_DOMAIN = "mil.marker"
"""The domain of nodes that stand for quantizers and codebooks until `mil_cli.export.onnx` has them replaced; no file
holds one."""

MARKER = "QuantizeAffine"
LEVELS_MARKER = "QuantizeLevels"
LOOKUP = "Lookup"
BLOCKS = "QuantizeBlocks"
DYNAMIC = "QuantizeDynamic"

_make_registry = ONNXRegistry.from_torchlib


def convert(program: ExportedProgram, *, opset: int) -> ir.Model:
    """Convert an exported program to an ONNX model in memory.

    A ``mil::quantize_affine`` becomes a node ``mil.marker::QuantizeAffine(x, scale, zero_point)`` with the attributes
    ``axis`` (absent: per tensor), ``quant_min`` and ``quant_max``; a ``mil::quantize_levels`` becomes
    ``mil.marker::QuantizeLevels(x, scale, levels)`` with the attribute ``axis``; a ``mil::lookup`` becomes
    ``mil.marker::Lookup(codebook, indices)`` with the attribute ``groups``; ``mil::quantize_blocks`` and
    ``mil::quantize_dynamic`` likewise. The exporter folds constants and fuses operators but does not know markers, so
    it cannot fold what they mark.

    Raises:
        torch.onnx.OnnxExporterError: An operator has no translation, say.
    """
    rewrite_attention(program)
    with _quiet(), _kept_registry():
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


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    pair = {"scale": "float", "zero_point": "int32"}
    marker = _marker(MARKER, {"x": "float", **pair}, ["quant_min", "quant_max"], "axis")
    lookup_marker = _marker(LOOKUP, {"codebook": "float", "indices": "uint8"}, ["groups"])
    blocks_marker = _marker(BLOCKS, {"x": "float", "scale": "float"}, ["axis", "block_size", "quant_min", "quant_max"])
    dynamic_marker = _marker(DYNAMIC, {"x": "float"}, [])

    def quantize_affine(x: Any, scale: Any, zero_point: Any, axis: int | None, quant_min: int, quant_max: int) -> Any:
        attributes: Mapping[str, int] = {} if axis is None else {"axis": axis}
        return marker(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max, **attributes)

    levels_marker = _marker(LEVELS_MARKER, {"x": "float", "scale": "float", "levels": "float"}, [], "axis")

    def quantize_levels(x: Any, scale: Any, levels: Any, axis: int | None) -> Any:
        attributes: Mapping[str, int] = {} if axis is None else {"axis": axis}
        return levels_marker(x, scale, levels, **attributes)

    def lookup(codebook: Any, indices: Any, groups: int) -> Any:
        return lookup_marker(codebook, indices, groups=groups)

    def quantize_blocks(x: Any, scale: Any, axis: int, block_size: int, quant_min: int, quant_max: int) -> Any:
        return blocks_marker(x, scale, axis=axis, block_size=block_size, quant_min=quant_min, quant_max=quant_max)

    def quantize_dynamic(x: Any) -> Any:
        return dynamic_marker(x)

    return {
        torch.ops.mil.quantize_affine.default: quantize_affine,
        torch.ops.mil.quantize_levels.default: quantize_levels,
        torch.ops.mil.lookup.default: lookup,
        torch.ops.mil.quantize_blocks.default: quantize_blocks,
        torch.ops.mil.quantize_dynamic.default: quantize_dynamic,
    }


def _marker(name: str, inputs: Mapping[str, str], required: Sequence[str], optional: str | None = None) -> Any:
    """Return the operator of a marker: inputs with their types, integer attributes, one float output."""
    schema = onnx.defs.OpSchema
    attributes = [schema.Attribute(each, schema.AttrType.INT, required=True) for each in required]
    if optional is not None:
        attributes.append(schema.Attribute(optional, schema.AttrType.INT, required=False))
    described = schema(
        name,
        MARKER_DOMAIN,
        1,
        inputs=[schema.FormalParameter(each, f"tensor({kind})") for each, kind in inputs.items()],
        outputs=[schema.FormalParameter("y", "tensor(float)")],
        attributes=attributes,
    )
    return onnxscript.values.Op(onnxscript.values.Opset(MARKER_DOMAIN, 1), name, described)


@functools.cache
def _torch_registry(opset: int, torchvision: bool) -> ONNXRegistry:
    """Return torch's own translations for an opset, which are more once torchvision is imported."""
    return _make_registry(opset_version=opset)


@contextlib.contextmanager
def _kept_registry() -> Iterator[None]:
    """Have the exporter copy its registry from the last time: to make it takes a third of a small model's export."""

    def from_torchlib(opset_version: int) -> ONNXRegistry:
        registry = copy.copy(_torch_registry(opset_version, "torchvision" in sys.modules))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    original = ONNXRegistry.from_torchlib
    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = original  # type: ignore[method-assign]


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
