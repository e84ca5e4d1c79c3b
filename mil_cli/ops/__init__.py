"""The ``mil::`` operators; importing this package registers them, so that archives holding them can be read."""

from mil_cli.ops.quantize import quantize_affine

__all__ = ["quantize_affine"]
