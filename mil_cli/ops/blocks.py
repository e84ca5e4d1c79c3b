"""The operator ``mil::quantize_blocks``: fake quantization of a weight with a scale for every block of a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCHEMA = "(Tensor x, Tensor scale, int axis, int block_size, int quant_min, int quant_max) -> Tensor"
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor x, Tensor scale, int axis, int block_size, int quant_min, int quant_max) -> (Tensor, Tensor)"
)


@torch.library.custom_op("mil::quantize_blocks", mutates_args=(), schema=SCHEMA)
def quantize_blocks(x: Tensor, scale: Tensor, axis: int, block_size: int, quant_min: int, quant_max: int) -> Tensor:
    """Round `x` to the values that an integer code can hold, and return them as floats.

    ``clamp(round(x / scale), quant_min, quant_max) * scale``, rounding half to even. A row is all that belongs to one
    index along `axis`, flattened; its blocks lie side by side, and the last one may be short.

    Args:
        x: A weight, of any shape.
        scale: Size of one step, positive: ``[rows, blocks]``.
        axis: The axis of the rows.
        block_size: Neighbours in a row that share a step.
        quant_min: The smallest code.
        quant_max: The largest code.

    Returns:
        A tensor like `x`.

    The gradient is that of ``mil::quantize_affine``: straight through inside the range and 0 outside; of a scale
    ``round(x / scale) - x / scale`` inside and the bound outside, summed over its block.
    """
    steps = block_steps(scale, x.shape, axis, block_size)
    return torch.empty_like(x).copy_(torch.div(x, steps).round_().clamp_(quant_min, quant_max).mul_(steps))


def block_steps(scale: Tensor, shape: torch.Size, axis: int, block_size: int) -> Tensor:
    """Return the step of each number of a weight with this shape; see `quantize_blocks`."""
    axis %= len(shape)
    rows = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
    steps = scale.repeat_interleave(block_size, 1)[:, : shape.numel() // max(shape[axis], 1)]
    return steps.reshape(rows).movedim(0, axis)


def block_codes(x: Tensor, scale: Tensor, axis: int, block_size: int, quant_min: int, quant_max: int) -> Tensor:
    """Return the integer codes (int32) that `quantize_blocks` rounds `x` to, as rows; see there for the arguments.

    Raises:
        ValueError: `x` holds a NaN, which has no code.
    """
    codes = torch.div(x, block_steps(scale, x.shape, axis, block_size)).round_()
    if bool(torch.isnan(codes).any()):
        raise ValueError("NaN has no integer code")
    return codes.clamp_(quant_min, quant_max).to(torch.int32).movedim(axis, 0).reshape(x.shape[axis], -1)


@quantize_blocks.register_fake
def _(x: Tensor, scale: Tensor, axis: int, block_size: int, quant_min: int, quant_max: int) -> Tensor:
    rows = x.shape[axis]
    if scale.shape != (rows, -(-x.numel() // max(rows, 1) // block_size)):
        raise ValueError("mil::quantize_blocks: there is one scale for each block of a row")
    return torch.empty_like(x)


@torch.library.custom_op("mil::quantize_blocks_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _quantize_blocks_backward(
    grad: Tensor, x: Tensor, scale: Tensor, axis: int, block_size: int, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    steps = torch.div(x, block_steps(scale, x.shape, axis, block_size))
    inside = (steps >= quant_min).logical_and_(steps <= quant_max)
    codes = steps.round().clamp_(quant_min, quant_max)
    slope = torch.where(inside, codes - steps, codes).mul_(grad).movedim(axis, 0).reshape(x.shape[axis], -1)
    short = scale.shape[1] * block_size - slope.shape[1]
    blocks = torch.nn.functional.pad(slope, (0, short)).reshape(*scale.shape, block_size)
    return torch.empty_like(x).copy_(grad * inside), blocks.sum(2)


@_quantize_blocks_backward.register_fake
def _(
    grad: Tensor, x: Tensor, scale: Tensor, axis: int, block_size: int, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, *ctx.arguments = inputs
    ctx.save_for_backward(x, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_scale, *_ = ctx.needs_input_grad
    grad_x, grad_scale = _quantize_blocks_backward(grad, *ctx.saved_tensors, *ctx.arguments)
    return grad_x if needs_x else None, grad_scale if needs_scale else None, None, None, None, None


quantize_blocks.register_autograd(_backward, setup_context=_setup_context)
