"""The ``mil::`` operators; importing this package registers them, so that archives holding them can be read."""

from mil_cli.ops.learned_scale import learned_scale
from mil_cli.ops.quantize import quantize_affine

__all__ = ["learned_scale", "quantize_affine"]
