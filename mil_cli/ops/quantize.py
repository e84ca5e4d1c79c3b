"""The operator ``mil::quantize_affine``: uniform fake quantization, per tensor or per channel, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCHEMA = "(Tensor x, Tensor scale, Tensor zero_point, int? axis, int quant_min, int quant_max) -> Tensor"
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, Tensor output, int? axis, int quant_min, int quant_max,"
    " bool scale_too) -> (Tensor, Tensor)"
)

_MARGIN, _SMALLEST = 2.0**-22, 2.0**-126
"""Two float32 roundings, relative, and the smallest normal float32."""


@torch.library.custom_op("mil::quantize_affine", mutates_args=(), schema=SCHEMA)
def quantize_affine(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, quant_min: int, quant_max: int
) -> Tensor:
    """Round `x` to the values that an integer code can hold, and return them as floats.

    ``(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``, rounding half to even as
    ONNX's QuantizeLinear does. A NaN stays one.

    Args:
        x: Values, of any shape.
        scale: Size of one step, positive: shape ``[]`` (or ``[1]``), or ``[x.shape[axis]]``.
        zero_point: The code of 0.0, int32, shaped like `scale`.
        axis: The axis along which each slice has its own step; None has one step for all.
        quant_min: The smallest code.
        quant_max: The largest code.

    Returns:
        A tensor like `x`.

    The gradient is the straight-through one of LSQ (Esser et al., Learned Step Size Quantization, 2020): that of `x`
    passes inside the range and is 0 outside; that of `scale` is ``round(x / scale) - x / scale`` inside and the
    (zero-point free) bound outside, summed over what shares the scale. LSQ's further factor on the scale's gradient
    is the training method's business.
    """
    low, high = _bounds(x, zero_point, axis, quant_min, quant_max)
    step = along(scale, x, axis)
    codes = torch.div(x, step)
    codes.round_()
    codes.clamp_(low, high)
    return codes.mul_(step)


def quantize_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, quant_min: int, quant_max: int
) -> Tensor:
    """Return the integer codes (int32) that `quantize_affine` rounds `x` to; see there for the arguments.

    Raises:
        ValueError: `x` holds a NaN, which has no code.
    """
    shift = along(zero_point, x, axis)
    codes = torch.div(x, along(scale, x, axis)).round_()
    if bool(torch.isnan(codes).any()):
        raise ValueError("NaN has no integer code")
    return codes.add_(shift).clamp_(quant_min, quant_max).to(torch.int32)


def along(value: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Shape a vector of per-channel values so that it broadcasts along `axis` of `x`."""
    if axis is None:
        return value.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return value.reshape(shape)


def _bounds(x: Tensor, zero_point: Tensor, axis: int | None, quant_min: int, quant_max: int) -> tuple[Any, Any]:
    """Return the bounds of codes less their zero point: numbers where one pair serves all, which clamps faster."""
    if axis is None:
        shift = int(zero_point)
        return quant_min - shift, quant_max - shift
    if not bool(zero_point.any()):
        return quant_min, quant_max
    shifts = along(zero_point, x, axis).to(x.dtype)
    return quant_min - shifts, quant_max - shifts


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"mil::quantize_affine: {what}")


@quantize_affine.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, quant_min: int, quant_max: int) -> Tensor:
    if axis is None:
        _require(scale.numel() == 1, "without an axis there is one scale")
    else:
        _require(scale.dim() == 1, "with an axis the scale is a vector")
    return torch.empty_like(x)


@torch.library.custom_op("mil::quantize_affine_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def quantize_affine_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    output: Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    scale_too: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x` and of `scale` (zeros unless `scale_too`), as one operator for graphs."""
    low, high = _bounds(x, zero_point, axis, quant_min, quant_max)
    if axis is None and x.dtype == torch.float32:
        return _one_step_backward(grad, x, scale, output, low, high, scale_too)
    step = along(scale, x, axis)
    steps = torch.div(x, step)
    inside = (steps >= low).logical_and_(steps <= high)
    grad_x = grad * inside
    if not scale_too:
        return grad_x, torch.zeros_like(scale)
    # Where the code was clamped the output is a bound times the scale; elsewhere the scale moves the rounding error.
    codes = steps.round().clamp_(low, high)
    slope = torch.where(inside, codes - steps, codes).mul_(grad)
    if axis is None:
        return grad_x, slope.sum().reshape(scale.shape)
    others = [dimension for dimension in range(x.dim()) if dimension != axis % x.dim()]
    return grad_x, slope.sum(others) if others else slope


def _one_step_backward(
    grad: Tensor, x: Tensor, scale: Tensor, output: Tensor, low: int, high: int, scale_too: bool
) -> tuple[Tensor, Tensor]:
    """Return the same where one step serves all, in three passes over memory instead of ten.

    The slope in the scale is the output's code, less the unrounded code where `x` is inside: the sum of
    ``grad * output - grad_x * x`` over the scale.
    """
    step = float(scale)
    # The kernel leaves out the bounds themselves, on which values lie that were quantized by the same step before.
    below, above = low * step, high * step
    below -= abs(below) * _MARGIN + _SMALLEST
    above += abs(above) * _MARGIN + _SMALLEST
    grad_x = torch.ops.aten.hardtanh_backward(grad, x, below, above)
    if not scale_too:
        return grad_x, torch.zeros_like(scale)
    # In the order of memory, in which all of them are views unless somebody chose another layout for one.
    order = sorted(range(output.dim()), key=output.stride, reverse=True)
    flat, flat_x, flat_grad, flat_grad_x = (value.permute(order).reshape(-1) for value in (output, x, grad, grad_x))
    total = torch.dot(flat_grad, flat) - torch.dot(flat_grad_x, flat_x)
    return grad_x, total.div_(step).reshape(scale.shape)


@quantize_affine_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    output: Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    scale_too: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, axis, quant_min, quant_max = inputs
    ctx.save_for_backward(x, scale, zero_point, output)
    ctx.arguments = (axis, quant_min, quant_max)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point, output = ctx.saved_tensors
    needs_x, needs_scale, *_ = ctx.needs_input_grad
    grad_x, grad_scale = quantize_affine_backward(grad, x, scale, zero_point, output, *ctx.arguments, needs_scale)
    return grad_x if needs_x else None, grad_scale if needs_scale else None, None, None, None, None


quantize_affine.register_autograd(_backward, setup_context=_setup_context)
