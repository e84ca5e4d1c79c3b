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


@dataclass(frozen=True)
class Coverage:
    """How an ONNX file runs in onnxruntime on this machine.

    Attributes:
        integer: Integer kernels of layers with weights, by operator, and how many of each.
        other_integer: Integer kernels of additions, concatenations and pooling.
        float_layers: Names of the layers with weights that run in float.
        conversions: How many times values are quantized or dequantized between kernels.
    """

    integer: dict[str, int]
    other_integer: dict[str, int]
    float_layers: tuple[str, ...]
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
        conversions=operators["QuantizeLinear"] + operators["DequantizeLinear"],
    )
