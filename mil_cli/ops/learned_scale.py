"""The operator ``mil::learned_scale``: what must stay positive while it trains, above all a quantizer's step size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-64
"""Below this a float32 quotient could overflow; only values that are all zero ever need one so small."""


@torch.library.custom_op(
    "mil::learned_scale", mutates_args=(), schema="(Tensor scale, float gradient_factor) -> Tensor"
)
def learned_scale(scale: Tensor, gradient_factor: float) -> Tensor:
    """Return a step size, or a batch norm's gamma, that is positive whatever training made of it.

    It is ``max(|scale|, 2^-64)``.

    The gradient is that of ``|scale|`` times `gradient_factor`, with which Esser et al., Learned Step Size Quantization
    (2020), bring the updates of step sizes into proportion with those of weights: ``1 / sqrt(N * Qp)`` for N values
    that share the step and a largest code of Qp. Where the floor holds the gradient still passes, so that a step which
    fell to 0 can grow again; at 0 itself it is that of the positive side.

    Args:
        scale: Any shape.
        gradient_factor: What the gradient is multiplied by.

    Returns:
        A tensor like `scale`.
    """
    return scale.abs().clamp_(min=SMALLEST_SCALE)


@learned_scale.register_fake
def _(scale: Tensor, gradient_factor: float) -> Tensor:
    return torch.empty_like(scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scale, ctx.factor = inputs
    ctx.save_for_backward(scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (scale,) = ctx.saved_tensors
    return torch.where(scale < 0, -grad, grad) * ctx.factor, None


learned_scale.register_autograd(_backward, setup_context=_setup_context)
