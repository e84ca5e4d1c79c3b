"""Gradients of quantizers that learn more than LSQ's scale: against the formulae of the papers, by torch's autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mil_cli.ops.clipped import quantize_clipped
from mil_cli.ops.levels import level_codes, quantize_levels
from mil_cli.ops.offset import quantize_offset, zero_point
from mil_cli.ops.quantize import quantize_affine


def values(seed: int = 0, shape: tuple[int, ...] = (6, 7)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def straight(rounded: Tensor, smooth: Tensor) -> Tensor:
    return smooth + (rounded - smooth).detach()


@pytest.mark.parametrize(("quant_min", "quant_max"), [(0, 7), (-4, 3)])
@pytest.mark.parametrize("offset", [-1.13, -0.4, 0.0])
def test_offset_has_the_forward_and_gradients_of_lsq_plus(offset: float, quant_min: int, quant_max: int) -> None:
    """Equations 4 to 6 of Bhalgat et al., the clip written out, on the offset that lies on the grid."""
    x, upstream = values().requires_grad_(), values(1)
    scale = torch.tensor(0.31, dtype=torch.float64, requires_grad=True)
    learned = torch.tensor(offset, dtype=torch.float64, requires_grad=True)
    found = quantize_offset(x, scale, learned, 0.5, quant_min, quant_max)
    found.backward(upstream)

    y, s = x.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()
    start = torch.tensor(round(offset / 0.31) * 0.31, dtype=torch.float64, requires_grad=True)
    steps = ((y - start) / s).clamp(0, quant_max - quant_min)
    expected = straight(steps.round(), steps) * s + start
    expected.backward(upstream)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(scale.grad, s.grad)
    assert start.grad is not None
    torch.testing.assert_close(learned.grad, 0.5 * start.grad)


def test_an_offset_becomes_the_zero_point_that_it_was_trained_with() -> None:
    x = values().float()
    for offset, code in ((-1.13, 4), (0.0, 0), (0.7, 0), (-9.0, 15)):
        scale, learned = torch.tensor(0.3), torch.tensor(offset)
        zeros = zero_point(scale, learned, 0, 15)
        assert int(zeros) == code
        integer = quantize_affine(x, scale, zeros, None, 0, 15)
        assert torch.equal(quantize_offset(x, scale, learned, 1.0, 0, 15), integer)
        assert torch.equal(quantize_offset(torch.zeros(3), scale, learned, 1.0, 0, 15), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_has_the_gradient_of_pact(dtype: torch.dtype) -> None:
    """Equation 2 of Choi et al.: 1 beyond the clip, 0 inside; what autograd gives for a clamp by a tensor."""
    x, upstream = values().to(dtype).requires_grad_(), values(1).to(dtype)
    alpha = torch.tensor(2.1, dtype=dtype, requires_grad=True)
    scale = (alpha / 7).detach().requires_grad_()
    found = quantize_clipped(x, scale, torch.tensor(0, dtype=torch.int32), 0, 7)
    found.backward(upstream)

    y = x.detach().clone().requires_grad_()
    clipped = torch.minimum(torch.relu(y), alpha)
    straight((clipped.detach() / alpha.detach() * 7).round() * alpha.detach() / 7, clipped).backward(upstream)
    torch.testing.assert_close(found, quantize_affine(x, scale, torch.tensor(0), None, 0, 7))
    torch.testing.assert_close(x.grad, y.grad)
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad / 7, alpha.grad)


def test_the_lower_end_of_a_clip_moves_in_proportion() -> None:
    x = torch.tensor([-5.0, 0.1, 5.0])
    scale = torch.tensor(0.2, requires_grad=True)
    quantize_clipped(x, scale, torch.tensor(3, dtype=torch.int32), 0, 7).backward(torch.tensor([1.0, 1.0, 10.0]))
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(-3 + 40)


LEVELS = torch.tensor([-8.0, -3.0, -1.0, 0.0, 1.0, 3.0, 8.0])


def test_levels_are_the_nearest_ones() -> None:
    x = values(2)
    scale = torch.tensor([0.2, 0.5, 0.1, 0.3, 0.4, 1.0], dtype=torch.float64)
    candidates = LEVELS.double() * scale[:, None, None]
    nearest = (x[..., None] - candidates).abs().argmin(-1)
    expected = candidates.expand(6, 7, 7).gather(-1, nearest[..., None])[..., 0]
    torch.testing.assert_close(quantize_levels(x, scale, LEVELS.double(), 0), expected)
    assert torch.equal(level_codes(x, scale, LEVELS.double(), 0).long(), nearest)
    columns = quantize_levels(x.T.contiguous(), scale, LEVELS.double(), 1)
    assert torch.equal(columns.T, quantize_levels(x, scale, LEVELS.double(), 0))
    assert quantize_levels(torch.tensor([float("nan")]), torch.tensor(1.0), LEVELS, None).isnan().all()


def test_even_levels_are_those_of_the_affine_quantizer() -> None:
    x = values(3).float().requires_grad_()
    found = []
    for even in (True, False):
        scale = torch.tensor([0.3, 0.2, 0.5, 0.4, 0.1, 0.7], requires_grad=True)
        x.grad = None
        if even:
            rounded = quantize_levels(x, scale, torch.arange(-7.0, 8.0), 0)
        else:
            rounded = quantize_affine(x, scale, torch.zeros(6, dtype=torch.int32), 0, -7, 7)
        rounded.backward(values(4).float())
        found.append((rounded.detach(), x.grad, scale.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("axis", [None, 0])
def test_level_gradients_agree_with_finite_differences_where_levels_stay(axis: int | None) -> None:
    """The staircase is linear in the scale while no value changes its level; straight-through adds the value itself."""
    x, upstream = values(5).requires_grad_(), values(6)
    scale = torch.full((6,) if axis == 0 else (), 0.25, dtype=torch.float64).requires_grad_()
    levels = LEVELS.double()
    quantize_levels(x, scale, levels, axis).backward(upstream)
    small, steps = 1e-7, x.detach() / 0.25
    inside = steps.abs() <= 8
    up, down = (quantize_levels(x.detach(), scale.detach() + way * small, levels, axis) for way in (1, -1))
    slope = (up - down) / (2 * small) - torch.where(inside, steps, 0)
    total = (slope * upstream).sum(1) if axis == 0 else (slope * upstream).sum()
    torch.testing.assert_close(scale.grad, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, upstream * inside)


def test_operator_contracts() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    scale, zero = torch.tensor(0.1, requires_grad=True), torch.tensor(3, dtype=torch.int32)
    torch.library.opcheck(quantize_clipped, (x, scale, zero, 0, 7))
    torch.library.opcheck(quantize_offset, (x, scale, torch.tensor(-0.3, requires_grad=True), 0.5, 0, 7))
    torch.library.opcheck(quantize_levels, (x, scale, LEVELS, None))
    torch.library.opcheck(quantize_levels, (x, torch.rand(4).add(0.1).requires_grad_(), LEVELS, -1))
    images = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(quantize_levels, (images, torch.rand(2).add(0.1).requires_grad_(), LEVELS, 0))
    assert quantize_levels(images, scale, LEVELS, None).is_contiguous(memory_format=torch.channels_last)
