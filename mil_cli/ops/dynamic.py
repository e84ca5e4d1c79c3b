"""The operator ``mil::quantize_dynamic``: fake quantization of an activation by the range that it has in this call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LARGEST = 255


@torch.library.custom_op("mil::quantize_dynamic", mutates_args=(), schema="(Tensor x) -> Tensor")
def quantize_dynamic(x: Tensor) -> Tensor:
    """Round `x` to 256 values between its smallest and its largest, one of which is 0.0, and return them as floats.

    This is ONNX's DynamicQuantizeLinear: with ``low = min(x, 0)`` and ``high = max(x, 0)`` over the whole tensor,
    ``scale = (high - low) / 255``, ``zero_point = round(-low / scale)`` and
    ``(clamp(round(x / scale) + zero_point, 0, 255) - zero_point) * scale``, rounding half to even.

    Args:
        x: Values, of any shape; samples of one batch share their range.

    Returns:
        A tensor like `x`. Nothing lies outside the range, so its gradient passes as it is.
    """
    if not x.numel():
        return x.clone()
    low, high = (value.clamp(**bound) for value, bound in zip(x.aminmax(), ({"max": 0}, {"min": 0}), strict=True))
    scale = (high - low) / _LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = (-low / scale).round()
    return torch.div(x, scale).round_().add_(zero_point).clamp_(0, _LARGEST).sub_(zero_point).mul_(scale)


@quantize_dynamic.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad


quantize_dynamic.register_autograd(_backward)
