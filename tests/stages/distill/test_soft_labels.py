"""Distillation by soft labels: the objective against closed forms, and the stage as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import MilError
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.distill.soft_labels import SoftLabelsConfig, soft_label_objective, soft_labels
from mil_cli.stages.train.supervised import SupervisedConfig, supervised
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from mil_cli.training.evaluate import evaluate
from mil_cli.training.loop import fit
from tests.stages.contexts import make_context
from tests.stages.distill.lessons import lesson_of


class Net(nn.Module):
    def __init__(self, hidden: int, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Linear(5, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.body(x)))))  # type: ignore[no-any-return]


def _capture(hidden: int, classes: int = 3) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(hidden)
        return Model.capture(Net(hidden, classes), (torch.randn(4, 5),))


@pytest.fixture(scope="module")
def student() -> Model:
    return _capture(6)


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 5, generator=generator)

    def split(samples: int) -> TensorSplit:
        x = torch.randn(samples, 5, generator=generator)
        return TensorSplit((x, (x @ directions.T).argmax(1)))

    return Data(name="planes", train=split(200), val=split(200), test=split(50))


@pytest.fixture(scope="module")
def teacher(data: Data) -> Model:
    settings = TrainerConfig(epochs=10, batch_size=20, learning_rate=0.1)
    return fit(_capture(24), task=Classification(), data=data, settings=settings, seed=0).model


def _context(data: Data, teacher: Model, **changes: Any) -> Context:
    settings = TrainerConfig(epochs=4, batch_size=20, learning_rate=0.05)
    return make_context(data, original=teacher, trainer=settings, **changes)


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


def test_the_student_comes_nearer_to_the_teacher(teacher: Model, student: Model, data: Data) -> None:
    context = _context(data, teacher)
    before = (student.fingerprint(), teacher.fingerprint())
    config = SoftLabelsConfig(weight=1.0, temperature=2.0)
    trained = soft_labels(student, config, context)
    x, _ = next(iter(data.val.batches(200)))  # type: ignore[misc]

    def far(model: Model) -> float:
        with torch.no_grad():
            return float(Classification().distance(model(x), teacher(x), (x, None), temperature=1.0))

    assert far(trained) < 0.3 * far(student)
    assert (student.fingerprint(), teacher.fingerprint()) == before
    assert not trained.training
    again = soft_labels(student, config, context)
    assert trained.fingerprint() == again.fingerprint()
    history = context.notes["history"]
    assert isinstance(history, list)
    assert len(history) == 4


def test_without_weight_it_is_supervised_training(teacher: Model, student: Model, data: Data) -> None:
    context = _context(data, teacher)
    plain = supervised(student, SupervisedConfig(trainer={"epochs": 2}), context)
    mixed = soft_labels(student, SoftLabelsConfig(weight=0.0, trainer={"epochs": 2}), context)
    assert plain.fingerprint() == mixed.fingerprint()
    quality = evaluate(plain, task=Classification(), split=data.val, split_name="val")
    assert quality.value > evaluate(student, task=Classification(), split=data.val, split_name="val").value


def test_any_source_can_teach(teacher: Model, student: Model, data: Data) -> None:
    sources = {"teacher.pt2": _capture(9)}
    context = _context(data, teacher, load_source=sources.__getitem__)
    config = SoftLabelsConfig(teacher="teacher.pt2", trainer={"epochs": 1})
    by_other = soft_labels(student, config, context)
    by_original = soft_labels(student, SoftLabelsConfig(trainer={"epochs": 1}), context)
    assert by_other.fingerprint() != by_original.fingerprint()


def test_a_teacher_that_does_not_fit_is_told(student: Model, data: Data) -> None:
    with pytest.raises(MilError, match="teacher"):
        soft_labels(student, SoftLabelsConfig(), _context(data, _capture(6, classes=4)))
    wrong_inputs = Model.capture(nn.Linear(7, 3), (torch.randn(4, 7),))
    with pytest.raises(MilError, match="same inputs"):
        soft_labels(student, SoftLabelsConfig(), _context(data, wrong_inputs))


@pytest.mark.parametrize("content", [{"temperature": 0}, {"weight": 1.1}, {"weight": -0.1}, {"alpha": 0.5}])
def test_settings_out_of_range_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SoftLabelsConfig.model_validate(content)
