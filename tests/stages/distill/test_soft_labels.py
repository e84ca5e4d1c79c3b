"""Distillation by soft labels: the objective against closed forms, and the stage as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.data.base import Data
from mil_cli.errors import MilError
from mil_cli.graph.model import Model
from mil_cli.stages.distill.soft_labels import SoftLabelsConfig, soft_label_objective, soft_labels
from mil_cli.stages.train.supervised import SupervisedConfig, supervised
from mil_cli.task.classification import Classification
from mil_cli.training.evaluate import evaluate
from tests.stages.distill.lessons import lesson_of
from tests.stages.distill.planes import context_of, divergence, net, planes, trained


@pytest.fixture(scope="module")
def student() -> Model:
    return net(6)


@pytest.fixture(scope="module")
def data() -> Data:
    return planes()


@pytest.fixture(scope="module")
def teacher() -> Model:
    return trained()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_objective_is_the_mix_of_hinton(weight: float, teacher: Model, data: Data) -> None:
    batch = next(iter(data.train.batches(9)))
    outputs = torch.randn(9, 3, requires_grad=True)
    config = SoftLabelsConfig(temperature=3.0, weight=weight)
    loss = soft_label_objective(lesson_of(teacher), config)(outputs, batch)
    x, labels = batch  # type: ignore[misc]
    with torch.no_grad():
        targets = functional.softmax(teacher(x) / 3, 1)
    soft = functional.kl_div(functional.log_softmax(outputs / 3, 1), targets, reduction="batchmean") * 9
    expected = (1 - weight) * functional.cross_entropy(outputs, labels) + weight * soft
    torch.testing.assert_close(loss, expected)
    # Closed form of the gradient: (1 - a)(p - onehot)/N + a T (p_T - q_T)/N.
    loss.backward()  # type: ignore[no-untyped-call]
    plain = functional.softmax(outputs, 1) - functional.one_hot(labels, 3)
    soft_gradient = 3.0 * (functional.softmax(outputs / 3, 1) - targets)
    torch.testing.assert_close(outputs.grad, ((1 - weight) * plain + weight * soft_gradient).detach() / 9)


def test_the_student_comes_nearer_to_the_teacher(teacher: Model, student: Model) -> None:
    context = context_of()
    before = (student.fingerprint(), teacher.fingerprint())
    config = SoftLabelsConfig(weight=1.0, temperature=2.0)
    learned = soft_labels(student, config, context)
    assert divergence(learned, teacher) < 0.3 * divergence(student, teacher)
    assert (student.fingerprint(), teacher.fingerprint()) == before
    assert not learned.training
    again = soft_labels(student, config, context)
    assert learned.fingerprint() == again.fingerprint()
    history = context.notes["history"]
    assert isinstance(history, list)
    assert len(history) == 4


def test_without_weight_it_is_supervised_training(student: Model, data: Data) -> None:
    context = context_of()
    plain = supervised(student, SupervisedConfig(trainer={"epochs": 2}), context)
    mixed = soft_labels(student, SoftLabelsConfig(weight=0.0, trainer={"epochs": 2}), context)
    assert plain.fingerprint() == mixed.fingerprint()
    quality = evaluate(plain, task=Classification(), split=data.val, split_name="val")
    assert quality.value > evaluate(student, task=Classification(), split=data.val, split_name="val").value


def test_any_source_can_teach(student: Model) -> None:
    sources = {"teacher.pt2": net(9)}
    context = context_of(load_source=sources.__getitem__)
    config = SoftLabelsConfig(teacher="teacher.pt2", trainer={"epochs": 1})
    by_other = soft_labels(student, config, context)
    by_original = soft_labels(student, SoftLabelsConfig(trainer={"epochs": 1}), context)
    assert by_other.fingerprint() != by_original.fingerprint()


def test_a_teacher_that_does_not_fit_is_told(student: Model) -> None:
    with pytest.raises(MilError, match="teacher"):
        soft_labels(student, SoftLabelsConfig(), context_of(original=net(6, classes=4)))
    wrong_inputs = Model.capture(nn.Linear(7, 3), (torch.randn(4, 7),))
    with pytest.raises(MilError, match="same inputs"):
        soft_labels(student, SoftLabelsConfig(), context_of(original=wrong_inputs))


class _TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize(
    ("teacher", "sample"),
    [(_TwoInputs(), (torch.zeros(4, 3), torch.zeros(4, 3))), (nn.Embedding(7, 3), (torch.zeros(4, dtype=torch.long),))],
)
def test_a_teacher_of_other_inputs_is_told_before_training(
    teacher: nn.Module, sample: tuple[Tensor, ...], student: Model
) -> None:
    context = context_of(original=Model.capture(teacher, sample), name="recover")
    with pytest.raises(MilError, match=r"stages\.recover\.teacher") as caught:
        soft_labels(student, SoftLabelsConfig(), context)
    assert "same inputs" in str(caught.value)


@pytest.mark.parametrize("content", [{"temperature": 0}, {"weight": 1.1}, {"weight": -0.1}, {"alpha": 0.5}])
def test_settings_out_of_range_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SoftLabelsConfig.model_validate(content)
