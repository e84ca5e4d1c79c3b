"""What the marker nodes of quantizers say, read from an ONNX graph."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from mil_cli.errors import ExportError
from mil_cli.export.exporter import LEVELS_MARKER, MARKER_DOMAIN
from mil_cli.export.surgery import constant_of
from mil_cli.ops.levels import level_codes
from mil_cli.ops.quantize import quantize_codes


@dataclass(frozen=True)
class Marker:
    """What one marker node says.

    Attributes:
        node: The node.
        x: What it rounds.
        scale: ``[]``, or ``[channels]`` along `axis`.
        zero_point: int32, shaped like `scale`; zeros where there are levels.
        axis: The axis of per-channel scales, or None.
        quant_min: The smallest code; 0 where there are levels.
        quant_max: The largest code; the index of the last level where there are levels.
        levels: What each code stands for in units of the scale; None: itself less the zero point.
    """

    node: ir.Node
    x: ir.Value
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int32]
    axis: int | None
    quant_min: int
    quant_max: int
    levels: npt.NDArray[np.float32] | None = None

    @property
    def output(self) -> ir.Value:
        """The rounded value."""
        return self.node.outputs[0]

    def same_codes(self, other: Marker) -> bool:
        """Whether quantizing with `other` what this one gives changes nothing."""
        return (
            (self.axis, self.quant_min, self.quant_max) == (other.axis, other.quant_min, other.quant_max)
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )

    def codes(self, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """Return the codes of a weight, int32, shaped like it.

        Raises:
            ExportError: It holds NaN or infinity.
        """
        if not np.all(np.isfinite(weight)):
            raise ExportError(f"the weight '{self.x.name}' holds NaN or infinity", hint="train it again or restore it")
        values = torch.from_numpy(np.ascontiguousarray(weight))
        scale = torch.from_numpy(np.array(self.scale))
        if self.levels is not None:
            found = level_codes(values, scale, torch.from_numpy(np.array(self.levels)), self.axis)
        else:
            zero_point = torch.from_numpy(np.array(self.zero_point))
            found = quantize_codes(values, scale, zero_point, self.axis, self.quant_min, self.quant_max)
        codes: npt.NDArray[np.int32] = found.numpy()
        return codes


def read_marker(node: ir.Node) -> Marker:
    """Read a marker node.

    Raises:
        ExportError: It has no form in ONNX.
    """
    inputs = [value for value in node.inputs if value is not None]
    if len(inputs) != 3:
        raise ExportError("a quantizer lost an input in the export", value=node.name)
    x, *sources = inputs
    scales, others = (constant_of(value) for value in sources)
    if scales is None or others is None:
        raise ExportError(
            "a quantizer's scale or zero point is computed at run time, ONNX needs a constant", value=node.name
        )
    if not np.all(np.isfinite(scales)) or not np.all(scales > 0):
        raise ExportError("a quantizer's scale is not positive and finite", value=sources[0].name)
    axis = node.attributes.get("axis")
    scales = scales.reshape(()) if axis is None else scales
    along = None if axis is None else axis.as_int()
    if node.op_type == LEVELS_MARKER:
        zeros = np.zeros(scales.shape, dtype=np.int32)
        return Marker(node, x, scales, zeros, along, 0, len(others) - 1, levels=others)
    zeros = others.reshape(()) if axis is None else others
    quant_min, quant_max = (node.attributes[name].as_int() for name in ("quant_min", "quant_max"))
    return Marker(node, x, scales, zeros, along, quant_min, quant_max)


def merge_markers(graph: ir.Graph) -> None:
    """Let one marker stand for all that round the same constant in the same way, in place.

    A weight that several modules share may come out of the exporter as several.
    """
    known: dict[tuple[object, ...], ir.Node] = {}
    for node in [node for node in graph if node.domain == MARKER_DOMAIN]:
        constants = [constant_of(value) for value in node.inputs]
        if any(value is None for value in constants):
            continue
        contents = [(str(value.dtype), value.shape, sha256(value.tobytes()).digest()) for value in constants]  # type: ignore[union-attr]
        settings = sorted((name, attribute.as_int()) for name, attribute in node.attributes.items())
        first = known.setdefault((node.op_type, *settings, *contents), node)
        if first is not node:
            ir.convenience.replace_all_uses_with(node.outputs[0], first.outputs[0], replace_graph_outputs=True)
            graph.remove(node, safe=True)
