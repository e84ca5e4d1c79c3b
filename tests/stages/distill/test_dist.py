"""Distillation by relations against numpy's correlations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from mil_cli.stages.distill.dist import DistConfig, dist, dist_objective, uncorrelated
from mil_cli.task.classification import Classification
from tests.stages.distill.lessons import lesson_of
from tests.stages.distill.planes import batch_of, context_of, divergence, net, trained


def test_correlations_are_those_of_numpy() -> None:
    left, right = torch.rand(6, 9), torch.rand(6, 9)
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(left.numpy(), right.numpy(), strict=True)]
    assert float(uncorrelated(left, right)) == pytest.approx(1 - np.mean(rows), abs=1e-6)


def test_scale_and_shift_of_a_row_do_not_count() -> None:
    left, right = torch.rand(6, 9), torch.rand(6, 9)
    changed = left * torch.rand(6, 1).add(0.5) + torch.randn(6, 1)
    torch.testing.assert_close(uncorrelated(changed, right), uncorrelated(left, right))
    assert float(uncorrelated(changed, left)) == pytest.approx(0, abs=1e-6)
    assert float(uncorrelated(-left, left)) == pytest.approx(2, abs=1e-6)


def test_rows_of_nearly_no_variance_give_no_gradient() -> None:
    start = torch.zeros(8, 10)
    for scores in (start, start + 1e-6 * torch.randn(8, 10), start + torch.tensor([9.0] + 9 * [0.0])):
        scores.requires_grad_()
        student, teacher = torch.softmax(scores, 1), torch.softmax(torch.randn(8, 10), 1)
        (uncorrelated(student, teacher) + uncorrelated(student.T, teacher.T)).backward()
        assert scores.grad is not None
        assert float(scores.grad.abs().max()) < 10
    small = torch.softmax(0.02 * torch.randn(8, 10), 1)
    torch.testing.assert_close(uncorrelated(small, small), torch.tensor(0.0), atol=1e-5, rtol=0)
    mixed = torch.cat([torch.ones(1, 10), small])
    torch.testing.assert_close(uncorrelated(mixed, mixed), torch.tensor(1 / 9), atol=1e-5, rtol=0)


def test_a_batch_without_labels_has_no_loss() -> None:
    images, outputs = torch.randn(4, 5), torch.randn(4, 3, requires_grad=True)
    lesson = lesson_of(trained(), task=Classification(ignore_index=-100))
    loss = dist_objective(lesson, DistConfig(label_weight=0.0))(outputs, (images, torch.full((4,), -100)))
    assert float(loss.detach()) == 0
    loss.backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None
    assert not outputs.grad.any()


@pytest.mark.parametrize(("beta", "gamma", "weight"), [(2.0, 2.0, 1.0), (1.0, 0.0, 0.0), (0.0, 3.0, 0.5)])
def test_the_objective_is_that_of_the_paper(beta: float, gamma: float, weight: float) -> None:
    x, labels = batch_of(9)
    outputs = torch.randn(9, 3)
    config = DistConfig(beta=beta, gamma=gamma, temperature=2.0, label_weight=weight)
    loss = dist_objective(lesson_of(trained()), config)(outputs, (x, labels))
    with torch.no_grad():
        own, its = (functional.softmax(each / 2, 1).double().numpy() for each in (outputs, trained()(x)))
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(own, its, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(own.T, its.T, strict=True)])
    expected = weight * float(functional.cross_entropy(outputs, labels)) + 4 * (beta * inter + gamma * intra)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_constant_rows_have_a_finite_gradient() -> None:
    rows = torch.full((3, 4), 0.25, requires_grad=True)
    loss = uncorrelated(rows, torch.rand(3, 4))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(1)
    assert rows.grad is not None
    assert bool(torch.isfinite(rows.grad).all())


def test_the_student_comes_nearer_to_the_teacher() -> None:
    student = net(6)
    learned = dist(student, DistConfig(label_weight=0.0), context_of())
    x, _ = batch_of(200)
    with torch.no_grad():
        teacher, before, after = (functional.softmax(each(x), 1) for each in (trained(), student, learned))
    assert float(uncorrelated(after, teacher)) < 0.3 * float(uncorrelated(before, teacher))
    assert divergence(learned, trained()) < divergence(student, trained())


@pytest.mark.parametrize("content", [{"beta": -1}, {"gamma": float("nan")}, {"temperature": 0}, {"alpha": 1}])
def test_settings_out_of_range_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DistConfig.model_validate(content)
