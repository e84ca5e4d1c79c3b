"""Decoupled distillation against its identity with the plain divergence and the formula of the authors' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import TaskError
from mil_cli.stages.distill.distil import Lesson
from mil_cli.stages.distill.dkd import DkdConfig, decoupled, dkd, dkd_objective
from mil_cli.stages.distill.teacher import Teacher
from mil_cli.task.classification import Classification
from mil_cli.task.divergence import softened_divergence
from mil_cli.task.regression import Regression
from tests.stages.contexts import running
from tests.stages.distill.lessons import lesson_of
from tests.stages.distill.planes import batch_of, context_of, divergence, net, trained


def _scores(classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, classes, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(0, classes, (7,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_parts_add_up_to_the_divergence_of_soft_labels(temperature: float, classes: int) -> None:
    student, teacher, labels = _scores(classes)
    target, others = decoupled(student, teacher, labels, temperature=temperature)
    doubt = 1 - functional.softmax(teacher / temperature, 1)[torch.arange(7), labels]
    whole = softened_divergence(student, teacher, temperature=temperature) / temperature**2
    torch.testing.assert_close(target + doubt * others, whole)


def _as_published(student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, T: float) -> Tensor:
    """The loss as the authors' code writes it: masks of -1000 and probabilities, here in double precision."""
    student, teacher = student.double(), teacher.double()
    right = functional.one_hot(target, student.shape[1]).bool()
    own, its = functional.softmax(student / T, 1), functional.softmax(teacher / T, 1)
    own, its = (torch.stack([(p * right).sum(1), (p * ~right).sum(1)], 1) for p in (own, its))
    tckd = functional.kl_div(own.log(), its, reduction="sum") * T**2 / len(target)
    own = functional.log_softmax(student / T - 1000.0 * right, 1)
    its = functional.softmax(teacher / T - 1000.0 * right, 1)
    nckd = functional.kl_div(own, its, reduction="sum") * T**2 / len(target)
    return alpha * tckd + beta * nckd


@pytest.mark.parametrize(("alpha", "beta", "weight"), [(1.0, 8.0, 1.0), (0.5, 0.0, 0.0), (0.0, 2.0, 0.3)])
def test_the_objective_is_that_of_the_paper(alpha: float, beta: float, weight: float) -> None:
    x, labels = batch_of(9)
    outputs = torch.randn(9, 3, requires_grad=True)
    config = DkdConfig(alpha=alpha, beta=beta, temperature=3.0, label_weight=weight, warmup=0.0)
    loss = dkd_objective(lesson_of(trained()), config)(outputs, (x, labels))
    with torch.no_grad():
        teacher = trained()(x)
    expected = _as_published(outputs, teacher, labels, alpha, beta, 3.0)
    expected = expected + weight * functional.cross_entropy(outputs.double(), labels)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, outputs)
    (wanted,) = torch.autograd.grad(expected, outputs)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_a_sure_teacher_gives_finite_gradients_in_half_precision() -> None:
    _, teacher, labels = _scores()
    student = (40 * functional.one_hot(labels, 5)).bfloat16().requires_grad_()
    target, others = decoupled(student, (200 * teacher).bfloat16(), labels, temperature=1.0)
    (target + others).sum().backward()  # type: ignore[no-untyped-call]
    assert target.dtype == torch.float32
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


def test_the_teachers_parts_warm_up_by_steps() -> None:
    x, labels = batch_of(9)
    outputs = torch.randn(9, 3)
    config = DkdConfig(label_weight=0.0, warmup=0.5)
    values = []
    for steps in (0, 9, 19, 39):
        under_way = running(trained(), steps=lambda steps=steps: steps, total_steps=40)
        lesson = Lesson(Classification(), under_way, [Teacher(trained(), Classification(), under_way)])
        values.append(float(dkd_objective(lesson, config)(outputs, (x, labels))))
    full = values[-1]
    assert values == pytest.approx([full / 20, full / 2, full, full])


def test_the_student_comes_nearer_to_the_teacher() -> None:
    student = net(6)
    learned = dkd(student, DkdConfig(), context_of())
    assert divergence(learned, trained()) < 0.3 * divergence(student, trained())
    assert learned.fingerprint() == dkd(student, DkdConfig(), context_of()).fingerprint()


def test_a_batch_without_labels_has_no_loss() -> None:
    student = torch.randn(0, 5, requires_grad=True)
    target, others = decoupled(student, torch.randn(0, 5), torch.zeros(0, dtype=torch.long), temperature=2.0)
    assert target.shape == others.shape == (0,)
    images, outputs = torch.randn(4, 5), torch.randn(4, 3, requires_grad=True)
    unlabelled = (images, torch.full((4,), -100))
    lesson = lesson_of(trained(), task=Classification(ignore_index=-100))
    loss = dkd_objective(lesson, DkdConfig(label_weight=0.0))(outputs, unlabelled)
    assert float(loss.detach()) == 0
    loss.backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None
    assert not outputs.grad.any()


def test_a_task_without_classes_is_told() -> None:
    x = torch.randn(40, 5)
    split = TensorSplit((x, x[:, :3]))
    numbers = Data(name="numbers", train=split, val=split, test=split)
    with pytest.raises(TaskError, match="soft_labels"):
        dkd(net(6), DkdConfig(), context_of(data=numbers, task=Regression()))


@pytest.mark.parametrize(
    "content", [{"alpha": -1}, {"beta": float("inf")}, {"temperature": 0}, {"warmup": 1.0}, {"label_weight": -0.1}]
)
def test_settings_out_of_range_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DkdConfig.model_validate(content)
