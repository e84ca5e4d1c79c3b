"""The operator ``mil::quantize_levels``: fake quantization to any sorted levels times a scale, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mil_cli.ops.quantize import along

SCHEMA = "(Tensor x, Tensor scale, Tensor levels, int? axis) -> Tensor"
BACKWARD_SCHEMA = "(Tensor grad, Tensor x, Tensor scale, Tensor levels, int? axis) -> (Tensor, Tensor)"


@torch.library.custom_op("mil::quantize_levels", mutates_args=(), schema=SCHEMA)
def quantize_levels(x: Tensor, scale: Tensor, levels: Tensor, axis: int | None) -> Tensor:
    """Round `x` to the nearest of ``levels * scale``; a NaN stays one.

    Args:
        x: Values, of any shape.
        scale: Positive, shape ``[]`` or ``[x.shape[axis]]``.
        levels: Floating, ``[levels]``, sorted, at least two.
        axis: The axis along which each slice has its own scale; None has one for all.

    Returns:
        A tensor like `x`. Its gradient is straight-through, as Li et al. 2020, "Additive Powers-of-Two Quantization",
        have it: that of `x` passes between the outermost levels and is 0 beyond; that of `scale` is
        ``level - x / scale`` between them and the outermost level beyond, summed over what shares the scale.
    """
    step = along(scale, x, axis)
    rounded = levels[level_codes(x, scale, levels, axis)] * step
    return torch.where(x.isnan(), x, rounded)


def level_codes(x: Tensor, scale: Tensor, levels: Tensor, axis: int | None) -> Tensor:
    """Return the index of the level that `quantize_levels` rounds each value to, int32, shaped like `x`.

    Memory is that of `x`, however many levels there are; a value midway between two takes the lower one.
    """
    borders = (levels[1:] + levels[:-1]) / 2
    steps = x.detach() / along(scale.detach(), x, axis)
    codes = torch.bucketize(steps.contiguous(), borders, out_int32=True)
    return torch.empty_like(steps, dtype=torch.int32).copy_(codes)  # laid out as `x` is


@quantize_levels.register_fake
def _(x: Tensor, scale: Tensor, levels: Tensor, axis: int | None) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mil::quantize_levels_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _quantize_levels_backward(
    grad: Tensor, x: Tensor, scale: Tensor, levels: Tensor, axis: int | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x` and of `scale`, as one operator for graphs."""
    steps = x / along(scale, x, axis)
    inside = (steps >= levels[0]) & (steps <= levels[-1])
    chosen = levels[level_codes(x, scale, levels, axis)]
    slope = torch.where(inside, chosen - steps, chosen) * grad
    if axis is None:
        return grad * inside, slope.sum().reshape(scale.shape)
    others = [dimension for dimension in range(x.dim()) if dimension != axis % x.dim()]
    return grad * inside, slope.sum(others) if others else slope


@_quantize_levels_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, levels: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, levels, ctx.axis = inputs
    ctx.save_for_backward(x, scale, levels)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_quantize_levels_backward(grad, *ctx.saved_tensors, ctx.axis), None, None


quantize_levels.register_autograd(_backward, setup_context=_setup_context)
