"""Which kernels onnxruntime runs a quantized file on, beside what its graph quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mil_cli.export.coverage import integer_coverage
from mil_cli.stages.quantize.describe import present_bits

if TYPE_CHECKING:
    from mil_cli.graph.model import Model

_WEIGHTS_ALONE = "MatMulNBits"
"""What reads weights as integers and activations as floats: no layer of the graph asked for both as integers."""


def kernels_of(graph: Model, path: Path) -> dict[str, Any] | None:
    """Return what a file's layers run on here, as in the report; None if the graph quantizes nothing.

    Args:
        graph: The graph that the file was exported from.
        path: The file.

    Returns:
        ``quantized_layers``: how many layers of the graph have weights and inputs of integers; ``integer_layers``: how
        many run on integer kernels; ``float_layers``: names of the nodes with weights that run in float;
        ``float_operators``: what else computes in float, and how many of each; ``conversions``: how many times values
        go from floats to integers or back.

    Raises:
        ExportError: onnxruntime cannot load the file.
    """
    bits = present_bits(graph).bits
    if not bits:
        return None
    coverage = integer_coverage(path)
    return {
        "quantized_layers": sum(read is not None for _, read in bits.values()),
        "integer_layers": coverage.integer_layers - coverage.integer.get(_WEIGHTS_ALONE, 0),
        "float_layers": list(coverage.float_layers),
        "float_operators": coverage.float_operators,
        "conversions": coverage.conversions,
    }


def kernel_notices(kernels: Mapping[str, Any] | None) -> list[str]:
    """Return what is to be said where a file does not run as its graph is quantized.

    Args:
        kernels: What `kernels_of` gave.
    """
    if kernels is None:
        return []
    asked, found, floats = kernels["quantized_layers"], kernels["integer_layers"], kernels["float_layers"]
    if found > asked:
        return [f"onnxruntime rounds {found - asked} layers to integers on this machine that the model has in float"]
    if found < asked and floats:
        return [
            f"onnxruntime runs {found} of the {asked} quantized layers on integer kernels on this machine; "
            f"with weights run in float: {', '.join(floats)}"
        ]
    return []
