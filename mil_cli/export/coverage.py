"""Reads from onnxruntime's own optimised graph which layers run on integer kernels and which do not."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx

from mil_cli.export.session import open_session, session_options

_INTEGER_LAYERS = frozenset(
    {
        *("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"),
        *("DynamicQuantizeMatMul", "MatMulNBits", "QAttention"),
    }
)
_FLOAT_LAYERS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
_INTEGER_OTHERS = frozenset(
    {"QLinearAdd", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearMul"}
)
_PASSING = frozenset({"DequantizeLinear", "Cast", "Transpose", "Reshape"})
_TO_INTEGERS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "Shape", "Size"})
_TO_FLOATS = frozenset({"DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"})
_QGEMM_INPUTS = 9
"""Inputs of a QGemm that gives integers; one with fewer gives floats."""

_MOVING = frozenset(
    {
        *("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "Identity", "Cast", "Pad"),
        *("Concat", "Split", "Slice", "Gather", "GatherND", "GatherElements", "DepthToSpace", "SpaceToDepth"),
        *("Shape", "Size", "ReorderInput", "ReorderOutput", "QuantizeLinear", "DequantizeLinear"),
        "DynamicQuantizeLinear",
    }
)
"""Operators that give values another place or form and compute nothing with them."""


@dataclass(frozen=True)
class Coverage:
    """How an ONNX file runs in onnxruntime on this machine.

    Attributes:
        integer: Integer kernels of layers with weights, by operator, and how many of each.
        other_integer: Integer kernels of additions, concatenations and pooling.
        float_layers: Names of the layers with weights that run in float.
        float_operators: What else computes in float, by operator, and how many of each.
        conversions: How many times values are quantized or dequantized between kernels.
    """

    integer: dict[str, int]
    other_integer: dict[str, int]
    float_layers: tuple[str, ...]
    float_operators: dict[str, int]
    conversions: int

    @property
    def integer_layers(self) -> int:
        """How many layers with weights run on integer kernels."""
        return sum(self.integer.values())


def integer_coverage(path: Path) -> Coverage:
    """Load a file into onnxruntime, let it optimise the graph, and count.

    Products of two activations (in attention) are not layers with weights and do not count.

    Raises:
        ExportError: onnxruntime cannot load the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = session_options(threads=1)
        options.optimized_model_filepath = str(optimized)
        open_session(path, threads=1, options=options)
        graph = onnx.load(optimized).graph
    operators = Counter(node.op_type for node in graph.node)
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # in order of execution
        if node.op_type in _PASSING and node.input[0] in constants:
            constants.update(node.output)
    layers = [
        node
        for node in graph.node
        if node.op_type in _FLOAT_LAYERS and any(name in constants for name in node.input[:2])
    ]
    return Coverage(
        integer={name: count for name, count in sorted(operators.items()) if name in _INTEGER_LAYERS},
        other_integer={name: count for name, count in sorted(operators.items()) if name in _INTEGER_OTHERS},
        float_layers=tuple(node.name or node.op_type for node in layers),
        float_operators=dict(sorted((_float_operators(graph) - Counter(node.op_type for node in layers)).items())),
        conversions=operators["QuantizeLinear"] + operators["DequantizeLinear"],
    )


def _float_operators(graph: onnx.GraphProto) -> Counter[str]:
    """Count the nodes of a graph that compute with floats which are no constants, by operator."""
    floats = {value.name for value in graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    found: Counter[str] = Counter()
    for node in graph.node:  # in order of execution
        reads = any(name in floats for name in node.input)
        if reads and node.op_type not in _MOVING | _INTEGER_LAYERS | _INTEGER_OTHERS:
            found[node.op_type] += 1
        if _gives_floats(node, reads_floats=reads):
            floats.update(node.output)
    return found


def _gives_floats(node: onnx.NodeProto, *, reads_floats: bool) -> bool:
    if node.op_type == "Cast":
        return any(each.name == "to" and each.i == onnx.TensorProto.FLOAT for each in node.attribute)
    if node.op_type == "QGemm":
        return len(node.input) < _QGEMM_INPUTS
    if node.op_type in _TO_FLOATS:
        return True
    return reads_floats and node.op_type not in _TO_INTEGERS and not node.op_type.startswith("QLinear")
