"""The ``mil::`` operators; importing this package registers them, so that archives holding them can be read."""

from mil_cli.ops.blocks import quantize_blocks
from mil_cli.ops.clipped import quantize_clipped
from mil_cli.ops.codebook import cluster, lookup
from mil_cli.ops.dynamic import quantize_dynamic
from mil_cli.ops.hard_concrete import hard_concrete
from mil_cli.ops.learned_scale import learned_scale
from mil_cli.ops.levels import quantize_levels
from mil_cli.ops.offset import quantize_offset
from mil_cli.ops.quantize import quantize_affine

QUANTIZERS = frozenset(
    {
        *("quantize_affine", "quantize_blocks", "quantize_clipped", "quantize_dynamic", "quantize_levels"),
        "quantize_offset",
    }
)
"""The operators that round values to those that a code can hold; the first argument of each is what it rounds."""

__all__ = [
    "QUANTIZERS",
    "cluster",
    "hard_concrete",
    "learned_scale",
    "lookup",
    "quantize_affine",
    "quantize_blocks",
    "quantize_clipped",
    "quantize_dynamic",
    "quantize_levels",
    "quantize_offset",
]
