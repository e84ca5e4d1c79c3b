"""The operator ``mil::quantize_clipped``: uniform fake quantization whose step learns from what was clipped alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mil_cli.ops.quantize import quantize_affine, quantize_affine_backward

SCHEMA = "(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max) -> Tensor"


@torch.library.custom_op("mil::quantize_clipped", mutates_args=(), schema=SCHEMA)
def quantize_clipped(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Round `x` as `mil_cli.ops.quantize_affine` does with one scale; only the gradient is another.

    Choi et al. 2018, "PACT: Parameterized Clipping Activation for Quantized Neural Networks": the gradient of `x`
    passes inside the range; that of the clip is 1 for values beyond it and 0 inside, where LSQ counts the rounding
    error too. A clip of ``alpha = scale * (quant_max - zero_point)`` has the gradient of `scale` divided by
    ``quant_max - zero_point``; a range that goes below 0 has its lower end in proportion.

    Args:
        x: Values, of any shape.
        scale: Size of one step, positive, ``[]`` or ``[1]``.
        zero_point: The code of 0.0, int32, shaped like `scale`.
        quant_min: The smallest code.
        quant_max: The largest code.

    Returns:
        A tensor like `x`.
    """
    rounded: Tensor = quantize_affine(x, scale, zero_point, None, quant_min, quant_max)
    return rounded


@quantize_clipped.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.quant_min, ctx.quant_max = inputs
    ctx.save_for_backward(x, scale, zero_point, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point, output = ctx.saved_tensors
    limits = ctx.quant_min, ctx.quant_max
    grad_x, _ = quantize_affine_backward(grad, x, scale, zero_point, output, None, *limits, False)
    grad_scale = None
    if ctx.needs_input_grad[1]:
        grad_scale = ((grad - grad_x) * output).sum().div(scale.reshape(())).reshape(scale.shape)
    return grad_x, grad_scale, None, None, None


quantize_clipped.register_autograd(_backward, setup_context=_setup_context)
