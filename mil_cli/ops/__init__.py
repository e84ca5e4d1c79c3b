"""The ``mil::`` operators; importing this package registers them, so that archives holding them can be read."""

from mil_cli.ops.codebook import cluster, lookup
from mil_cli.ops.hard_concrete import hard_concrete
from mil_cli.ops.learned_scale import learned_scale
from mil_cli.ops.quantize import quantize_affine

__all__ = ["cluster", "hard_concrete", "learned_scale", "lookup", "quantize_affine"]
