"""The operator ``mil::quantize_offset``: uniform fake quantization whose step and lower end both learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mil_cli.ops.quantize import quantize_affine, quantize_affine_backward

SCHEMA = "(Tensor x, Tensor scale, Tensor offset, float offset_factor, int quant_min, int quant_max) -> Tensor"


@torch.library.custom_op("mil::quantize_offset", mutates_args=(), schema=SCHEMA)
def quantize_offset(
    x: Tensor, scale: Tensor, offset: Tensor, offset_factor: float, quant_min: int, quant_max: int
) -> Tensor:
    """Round `x` to a range that begins at a learned offset, which is itself rounded to a whole number of steps.

    Bhalgat et al. 2020, "LSQ+: Improving low-bit quantization through learnable offsets and better initialization":
    ``scale * round(clip((x - offset) / scale, 0, quant_max - quant_min)) + offset``. The offset of the paper is any
    number; here the forward takes `zero_point` of it, as integer kernels have it, so that nothing is left to round
    after the training and 0.0, which convolutions pad with, always is a value of its own.

    Args:
        x: Values, of any shape.
        scale: Size of one step, positive, ``[]`` or ``[1]``.
        offset: Where the range begins, shaped like `scale`.
        offset_factor: What the gradient of `offset` is multiplied by.
        quant_min: The smallest code.
        quant_max: The largest code.

    Returns:
        A tensor like `x`. The gradients are those of the paper, straight through both roundings: that of `x` passes
        inside the range; that of `scale` is ``round(v) - v`` with ``v = (x - offset) / scale`` inside, 0 below, and
        ``quant_max - quant_min`` above; that of `offset` is 0 inside and 1 outside.
    """
    zeros = zero_point(scale, offset, quant_min, quant_max)
    rounded: Tensor = quantize_affine(x, scale, zeros, None, quant_min, quant_max)
    return rounded


def zero_point(scale: Tensor, offset: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Return the code of 0.0 in the range that begins nearest to `offset` and holds 0.0: int32, like `scale`."""
    return (quant_min - offset / scale).round().clamp(quant_min, quant_max).to(torch.int32)


@quantize_offset.register_fake
def _(x: Tensor, scale: Tensor, offset: Tensor, offset_factor: float, quant_min: int, quant_max: int) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, offset, ctx.factor, ctx.quant_min, ctx.quant_max = inputs
    ctx.save_for_backward(x, scale, offset, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, offset, output = ctx.saved_tensors
    limits = ctx.quant_min, ctx.quant_max
    zeros = zero_point(scale, offset, *limits)
    grad_x, grad_scale = quantize_affine_backward(grad, x, scale, zeros, output, None, *limits, True)
    outside = (grad - grad_x).sum().reshape(scale.shape)
    # With the zero point held, both bounds move with the scale; here the lower one is the offset's.
    grad_scale = grad_scale - (ctx.quant_min - zeros) * outside
    return grad_x, grad_scale, outside * ctx.factor, None, None, None


quantize_offset.register_autograd(_backward, setup_context=_setup_context)
