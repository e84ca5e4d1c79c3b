"""Distillation by hints: the error against closed forms, and adapters that come and go."""

from __future__ import annotations

import torch
from torch.nn import functional

from mil_cli.stages.distill.hints import Hint


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_behind_an_identity_it_is_the_squared_error_of_features_of_the_same_size() -> None:
    for shape in ((5, 6), (5, 6, 7), (5, 6, 4, 3)):
        student, teacher = torch.randn(shape), torch.randn(shape)
        student, teacher = student / student.square().mean().sqrt(), teacher / teacher.square().mean().sqrt()
        for scale in (1.0, 1e-3, 1e3):
            error = Hint(6, 6, generator=_generator())(scale * student, teacher / scale)
            torch.testing.assert_close(error, functional.mse_loss(student, teacher))


def test_where_nothing_is_predicted_the_error_is_one() -> None:
    hint = Hint(4, 9, generator=_generator())
    student = torch.zeros(5, 4, 3, 3, requires_grad=True)
    error = hint(student, 7 * torch.randn(5, 9, 3, 3))
    torch.testing.assert_close(error, torch.tensor(1.0))
    error.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(hint(torch.randn(5, 4, 3, 3), torch.zeros(5, 9, 3, 3)))


def test_an_adapter_maps_channels_alike_at_each_position() -> None:
    hint = Hint(4, 9, generator=_generator())
    with torch.no_grad():
        hint.adapter.bias.normal_(generator=_generator())
    for shape in ((5, 4, 3, 3), (5, 4, 6), (5, 4)):
        student, teacher = torch.randn(shape), torch.randn(5, 9, *shape[2:])
        one, other = student / student.square().mean().sqrt(), teacher / teacher.square().mean().sqrt()
        bias = hint.adapter.bias.reshape(9, *[1] * (len(shape) - 2))
        adapted = torch.einsum("oc,bc...->bo...", hint.adapter.weight, one) + bias
        torch.testing.assert_close(hint(student, teacher), (adapted - other).square().mean())


def test_adapters_start_alike_by_seed_and_keep_lengths() -> None:
    one, other, third = (Hint(9, 4, generator=_generator(seed)).adapter.weight for seed in (1, 1, 2))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    torch.testing.assert_close(one @ one.T, torch.eye(4))


def test_a_finer_feature_is_averaged_first() -> None:
    hint = Hint(6, 6, generator=_generator())
    fine, coarse = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 2, 2)
    pooled = functional.avg_pool2d(fine, 2)
    torch.testing.assert_close(hint(fine, coarse), hint(pooled, coarse))
    torch.testing.assert_close(hint(coarse, fine), hint(coarse, pooled))
