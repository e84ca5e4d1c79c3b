"""Attention transfer: maps written out position by position, and what must not matter to them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mil_cli.stages.distill.attention_transfer import attention_difference


def _written_out(student: Tensor, teacher: Tensor) -> float:
    """Compare features of shape (batch, channels, positions) by loops."""
    total = 0.0
    for one, other in zip(student.double(), teacher.double(), strict=True):
        maps = [[sum(float(value) ** 2 for value in column) for column in feature.T] for feature in (one, other)]
        lengths = [math.sqrt(sum(value**2 for value in values)) for values in maps]
        total += sum((a / lengths[0] - b / lengths[1]) ** 2 for a, b in zip(*maps, strict=True))
    return total / len(student)


def test_it_is_the_distance_of_attention_vectors() -> None:
    student, teacher = torch.randn(3, 4, 10), torch.randn(3, 7, 10)
    expected = torch.tensor(_written_out(student, teacher)).float()
    torch.testing.assert_close(attention_difference(student, teacher), expected)
    maps = student.unflatten(2, (2, 5)), teacher.unflatten(2, (2, 5))
    torch.testing.assert_close(attention_difference(*maps), expected)


def test_equal_attention_is_no_difference_whatever_its_scale_sign_and_channels() -> None:
    feature = torch.randn(3, 4, 5, 5)
    same = torch.cat([-3 * feature, 3 * feature[:, torch.randperm(4)]], 1)
    torch.testing.assert_close(attention_difference(feature, same), torch.tensor(0.0), atol=1e-6, rtol=0)
    other = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(attention_difference(7 * feature, other), attention_difference(feature, 0.1 * other))


def test_separate_attention_is_the_most_that_samples_differ() -> None:
    student, teacher = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)
    student[:, :, :4], teacher[:, :, 4:] = 1.0, 1.0
    torch.testing.assert_close(attention_difference(student, teacher), torch.tensor(2.0))


def test_attention_of_another_resolution_is_averaged() -> None:
    fine, coarse = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)
    power = torch.stack([(fine[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] ** 2).sum((1, 2, 3)) for i, j in _CELLS], 1)
    expected = _written_out(power.sqrt()[:, None], coarse.flatten(2))
    torch.testing.assert_close(attention_difference(fine, coarse), torch.tensor(expected).float())


_CELLS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_dead_student_gets_a_finite_gradient() -> None:
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention_difference(student, torch.randn(2, 3, 4, 4)).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
