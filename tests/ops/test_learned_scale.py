"""A step size while it is learned: positive, and its gradient scaled; with the quantizer, the gradients of LSQ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mil_cli.ops.learned_scale import SMALLEST_SCALE, learned_scale
from mil_cli.ops.quantize import quantize_affine


def test_forward_is_the_magnitude_above_a_floor() -> None:
    values = torch.tensor([0.25, -0.5, 0.0, -0.0, 1e-30, -3.0])
    assert learned_scale(values, 0.1).tolist() == [0.25, 0.5, SMALLEST_SCALE, SMALLEST_SCALE, SMALLEST_SCALE, 3.0]
    assert learned_scale(torch.tensor(0.125), 0.1).shape == ()


def test_gradient_is_that_of_the_magnitude_times_the_factor() -> None:
    values = torch.tensor([0.25, -0.5, 0.0, 1e-30, -1e-30], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, -4.0, -5.0])
    learned_scale(values, 0.25).backward(upstream)
    assert values.grad is not None
    # where the floor holds it passes too
    assert values.grad.tolist() == [0.25, -0.5, 0.75, -1.0, 1.25]


def test_gradient_agrees_with_finite_differences() -> None:
    """Away from 0 the operator is smooth; with a factor of 1 its gradient is the plain derivative."""
    values = torch.tensor([0.3, -0.7, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: learned_scale(value, 1.0), (values,))


@pytest.mark.parametrize("axis", [None, 0])
def test_with_the_quantizer_it_gives_the_gradients_of_the_paper(axis: int | None) -> None:
    """Inside, below and above the range, written out for each value: equation 3 of Esser et al."""
    x = torch.tensor([[0.26, -0.12, 0.9], [-5.0, 0.52, -0.33]])
    quant_min, quant_max = -3, 3
    parameter = torch.tensor(0.2 if axis is None else [0.2, -0.2], requires_grad=True)  # a sign that training flipped
    zero_point = torch.zeros(parameter.shape, dtype=torch.int32)
    factor = 1 / math.sqrt(x.numel() / parameter.numel() * quant_max)
    quantized = quantize_affine(x, learned_scale(parameter, factor), zero_point, axis, quant_min, quant_max)
    quantized.sum().backward()  # type: ignore[no-untyped-call]

    def slope(value: float) -> float:
        steps = value / 0.2
        if steps < quant_min:
            return quant_min
        return quant_max if steps > quant_max else round(steps) - steps

    slopes = torch.tensor([[slope(value) for value in row] for row in x.tolist()])
    signs = torch.tensor(1.0 if axis is None else [1.0, -1.0])
    expected = (slopes.sum() if axis is None else slopes.sum(1)) * factor * signs
    torch.testing.assert_close(parameter.grad, expected)


def test_gradients_are_finite_differences_of_the_staircase_corrected_inside() -> None:
    """While no code changes, an output is its code times the scale, whatever the value.

    Passing straight through takes the derivative by the value for 1 inside the range instead of 0, and that by the
    scale for less by what follows from it: the value in steps.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, generator=generator, dtype=torch.float64) * 2
    scale, zero = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0, dtype=torch.int32)
    weights = torch.randn(40, generator=generator, dtype=torch.float64)
    values, step = x.clone().requires_grad_(), scale.clone().requires_grad_()
    (quantize_affine(values, step, zero, None, -3, 3) * weights).sum().backward()  # type: ignore[no-untyped-call]
    small = 1e-7

    def slope(by_value: float, by_scale: float) -> Tensor:
        high, low = (
            quantize_affine(x + sign * by_value, scale + sign * by_scale, zero, None, -3, 3) for sign in (1, -1)
        )
        return (high - low) * weights / (2 * small)

    inside = (x / scale).abs() <= 3
    assert 0 < int(inside.sum()) < len(x)
    torch.testing.assert_close(values.grad, slope(small, 0.0) + inside * weights)
    expected = slope(0.0, small).sum() - (inside * weights * x / scale).sum()
    torch.testing.assert_close(step.grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed", "expanded"])
def test_the_fast_backward_is_the_plain_one(layout: str) -> None:
    """One step for float32 values goes its own way; float64 takes the plain one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 5, 4, 3, generator=generator)
    if layout == "expanded":
        x = x[:, :1].expand(6, 5, 4, 3)
    upstream = torch.randn(6, 5, 4, 3, generator=generator)
    if layout in ("channels_last", "mixed"):
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last":
        upstream = upstream.contiguous(memory_format=torch.channels_last)
    found = []
    for dtype in (torch.float32, torch.float64):
        values = x.detach().to(dtype).detach().requires_grad_()
        scale = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        quantize_affine(values, scale, torch.tensor(2, dtype=torch.int32), None, 0, 7).backward(upstream.to(dtype))
        found.append((values.grad, scale.grad))
    for fast, plain in zip(*found, strict=True):
        assert fast is not None
        assert plain is not None
        torch.testing.assert_close(fast.double(), plain, rtol=1e-5, atol=1e-5)


def test_a_value_on_the_bound_is_inside() -> None:
    """What was quantized by the same step before lies exactly there."""
    scale = torch.tensor(0.1, requires_grad=True)
    zero = torch.tensor(0, dtype=torch.int32)
    first = quantize_affine(torch.tensor([9.0, -9.0, 0.1]), scale.detach(), zero, None, -3, 3).requires_grad_()
    quantize_affine(first, scale, zero, None, -3, 3).sum().backward()  # type: ignore[no-untyped-call]
    assert first.grad is not None
    assert first.grad.tolist() == [1.0, 1.0, 1.0]
    assert float(scale.grad) == pytest.approx(0.0, abs=1e-5)  # type: ignore[arg-type]


def test_operator_contract() -> None:
    torch.library.opcheck(learned_scale, (torch.tensor(0.1, requires_grad=True), 0.5))
    torch.library.opcheck(learned_scale, ((torch.rand(3) - 0.5).requires_grad_(), 0.5))
