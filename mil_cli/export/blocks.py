"""Turns block quantizers of weights into packed codes and scales, which are multiplied once, when the file is loaded.

The activations of these layers are float. A DequantizeLinear would be run at every inference, which makes products 2 to
10 times slower; a Cast and a Mul are folded, so that the layers take the time of the float model's. Tables in which
rows are looked up stay integers in memory, and so do large weights that one row is multiplied by.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from mil_cli.errors import ExportError
from mil_cli.export.exporter import BLOCKS, MARKER_DOMAIN
from mil_cli.export.nbits import PROVIDERS, is_row_product, write_row_product
from mil_cli.export.packing import storage_bits, write_codes
from mil_cli.export.surgery import GraphWriter, constant_of
from mil_cli.export.tables import lookups_in, write_lookups
from mil_cli.ops.blocks import block_codes

_FLOAT = ir.DataType.FLOAT


def write_blocks(onnx: GraphWriter, widths: Collection[int], *, provider: str | None = None) -> list[str]:
    """Replace every marker of a block quantizer, in place.

    Args:
        onnx: Writes into a graph as `mil_cli.export.exporter.convert` gives it.
        widths: The bits of packed weights that the target takes.
        provider: The target's execution provider, on which it depends which operators may be used; None: any may.

    Returns:
        What the user should know about how weights are stored.

    Raises:
        ExportError: A quantizer has no form in ONNX.
    """
    markers = [node for node in onnx.graph if node.domain == MARKER_DOMAIN and node.op_type == BLOCKS]
    counts: dict[int, int] = {}
    for node in markers:
        bits = storage_bits(node.attributes["quant_min"].as_int(), node.attributes["quant_max"].as_int(), widths)
        counts[bits] = counts.get(bits, 0) + 1
        weight = _read(node, bits)
        if _is_table(node, weight):
            _write_table(onnx, node, weight)
        elif provider in (None, *PROVIDERS) and _is_streamed(onnx, node, weight):
            _write_products(onnx, node, weight)
        else:
            onnx.replace(node.outputs[0], _write(onnx, node, weight), node)
    return [
        f"{count} weight{'s' if count > 1 else ''}: stored in {bits} bits each and read out when the file is loaded: "
        "fewer bytes on disk, no gain in time"
        for bits, count in sorted(counts.items())
    ]


@dataclass(frozen=True)
class _Weight:
    """The codes and scales of one marker, both by rows."""

    name: str
    shape: tuple[int, ...]
    axis: int
    codes: npt.NDArray[np.int32]
    scale: npt.NDArray[np.float32]
    size: int
    bits: int

    @property
    def blocks(self) -> int:
        """How many blocks a row has."""
        return int(self.scale.shape[1])

    @property
    def whole(self) -> bool:
        """Whether blocks of equal size fill each row."""
        return self.blocks == 1 or self.blocks * self.size == self.codes.shape[1]


def _read(node: ir.Node, bits: int) -> _Weight:
    weight, scale = _constants(node)
    axis, size, low, high = (
        node.attributes[name].as_int() for name in ("axis", "block_size", "quant_min", "quant_max")
    )
    tensor, steps = (torch.from_numpy(np.ascontiguousarray(value)) for value in (weight, scale))
    codes = block_codes(tensor, steps, axis, size, low, high).numpy()
    name = (node.inputs[0].name or "weight").removesuffix(".weight")  # type: ignore[union-attr]
    return _Weight(name, weight.shape, axis % weight.ndim, codes, scale, size, bits)


def _write(onnx: GraphWriter, node: ir.Node, weight: _Weight) -> ir.Value:
    """Write a weight; returns its floats."""
    axis, rank = weight.axis, len(weight.shape)
    rows = (weight.shape[axis], *weight.shape[:axis], *weight.shape[axis + 1 :])
    value = write_codes(onnx, node, f"{weight.name}.codes", weight.codes, weight.bits, _FLOAT)
    value = onnx.insert(node, "Mul", [value, _write_steps(onnx, node, weight)], {}, _FLOAT)
    if rows != weight.codes.shape:
        value = onnx.reshape(node, value, rows, _FLOAT)
    if axis:
        order = [*range(1, axis + 1), 0, *range(axis + 1, rank)]
        value = onnx.insert(node, "Transpose", [value], {"perm": order}, _FLOAT)
    return value


def _is_table(node: ir.Node, weight: _Weight) -> bool:
    """Whether all that reads a weight looks rows up in it."""
    looks = lookups_in(node.outputs[0])
    ranked = all(look.inputs[1].shape is not None for look in looks)  # type: ignore[union-attr]
    plain = len(weight.shape) == 2 and weight.axis == 0 and weight.whole
    alone = len(looks) == len(list(node.outputs[0].consumers())) and not node.outputs[0].is_graph_output()
    return bool(looks) and alone and ranked and plain


def _write_table(onnx: GraphWriter, node: ir.Node, weight: _Weight) -> None:
    """Write a table of which codes are looked up."""
    codes = write_codes(onnx, node, f"{weight.name}.codes", weight.codes, weight.bits, ir.DataType.INT8)
    scale = weight.scale
    if weight.blocks > 1:
        codes = onnx.reshape(node, codes, (len(scale), weight.blocks, weight.size), ir.DataType.INT8)
        scale = scale[:, :, None]
    steps = _write_scale(onnx, node, f"{weight.name}.scale", scale)
    write_lookups(onnx, lookups_in(node.outputs[0]), codes, steps, flatten=weight.blocks > 1)
    onnx.graph.remove(node, safe=True)


def _constants(node: ir.Node) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    weight, scale = (constant_of(value) for value in node.inputs)
    if weight is None or scale is None:
        raise ExportError("a weight in blocks, or its scale, is computed at run time", value=node.name)
    if not np.all(np.isfinite(scale)) or not np.all(scale > 0):
        raise ExportError("a quantizer's scale is not positive and finite", value=node.inputs[1].name)  # type: ignore[union-attr]
    if not np.all(np.isfinite(weight)):
        raise ExportError(
            f"the weight '{node.inputs[0].name}' holds NaN or infinity",  # type: ignore[union-attr]
            hint="train it again or restore it",
        )
    return weight, scale


def _is_streamed(onnx: GraphWriter, node: ir.Node, weight: _Weight) -> bool:
    """Whether all that reads a weight is faster, and never slower, when it reads the codes themselves."""
    users = list(node.outputs[0].consumers())
    fits = weight.bits == 4 and weight.blocks > 1 and weight.whole and not node.outputs[0].is_graph_output()
    return fits and bool(users) and all(is_row_product(onnx.graph, user, node.outputs[0]) for user in users)


def _write_products(onnx: GraphWriter, node: ir.Node, weight: _Weight) -> None:
    scale = _write_scale(onnx, node, f"{weight.name}.scale", weight.scale[:, :, None])
    scale = onnx.reshape(node, scale, weight.scale.shape, _FLOAT)
    for product in list(node.outputs[0].consumers()):
        write_row_product(onnx, product, weight.name, weight.codes, scale, weight.size)
    onnx.graph.remove(node, safe=True)


def _write_steps(onnx: GraphWriter, node: ir.Node, weight: _Weight) -> ir.Value:
    """Write the scales of a weight; returns the step of each number in a row, or of the whole row."""
    if weight.blocks == 1:
        return _write_scale(onnx, node, f"{weight.name}.scale", weight.scale)
    value = _write_scale(onnx, node, f"{weight.name}.scale", weight.scale[:, :, None])
    shape = onnx.constant("shape", np.array([1, 1, weight.size]), ir.DataType.INT64)
    value = onnx.insert(node, "Expand", [value, shape], {}, _FLOAT)
    value = onnx.reshape(node, value, (len(weight.scale), -1), _FLOAT)
    if weight.whole:
        return value
    ends: list[ir.Value | None] = [
        onnx.constant("bound", np.array([number]), ir.DataType.INT64) for number in (0, weight.codes.shape[1], 1)
    ]
    return onnx.insert(node, "Slice", [value, *ends], {}, _FLOAT)


def _write_scale(onnx: GraphWriter, node: ir.Node, name: str, scale: npt.NDArray[np.float32]) -> ir.Value:
    """Write scales, those of blocks in 16 bits where that loses nothing; returns them as floats."""
    short = scale.astype(ir.DataType.BFLOAT16.numpy())
    if scale.ndim < 3 or not np.array_equal(short.astype(np.float32), scale):
        return onnx.constant(name, scale, _FLOAT)
    stored = onnx.constant(name, short, ir.DataType.BFLOAT16)
    return onnx.insert(node, "Cast", [stored], {"to": int(_FLOAT)}, _FLOAT)
