"""Similarities of samples, by a loop over them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mil_cli.stages.distill.similarity import similarity_difference


def _rows(feature: Tensor) -> list[list[float]]:
    rows = []
    for one in feature.double():
        row = [float((one * other).sum()) for other in feature.double()]
        length = math.sqrt(sum(value**2 for value in row))
        rows.append([value / length for value in row])
    return rows


def test_it_is_the_distance_of_rows_of_scalar_products() -> None:
    student, teacher = torch.randn(6, 3, 4, 4), torch.randn(6, 8, 5)
    expected = sum(
        sum((one - other) ** 2 for one, other in zip(*pair, strict=True))
        for pair in zip(_rows(student), _rows(teacher), strict=True)
    )
    torch.testing.assert_close(similarity_difference(student, teacher), torch.tensor(expected / 6).float())


def test_turning_and_scaling_change_nothing() -> None:
    feature, other = torch.randn(6, 12), torch.randn(6, 5)
    turned = 4 * feature @ torch.linalg.qr(torch.randn(12, 12))[0]
    torch.testing.assert_close(similarity_difference(turned, feature), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(similarity_difference(turned, other), similarity_difference(feature, other))


def test_a_dead_student_gets_a_finite_gradient() -> None:
    student = torch.zeros(4, 3, requires_grad=True)
    similarity_difference(student, torch.randn(4, 5)).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
