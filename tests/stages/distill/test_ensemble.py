"""Several teachers: the gradient in closed form, who runs when, weights by val, the same end after kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.stages.distill.distil import Lesson
from mil_cli.stages.distill.ensemble import EnsembleConfig, ensemble, ensemble_objective, teacher_weights
from mil_cli.stages.distill.soft_labels import SoftLabelsConfig, soft_labels
from mil_cli.stages.distill.teacher import Teacher
from mil_cli.stages.train.supervised import SupervisedConfig, supervised
from mil_cli.task.classification import Classification
from tests.stages.contexts import run_through_kills, running
from tests.stages.distill.lessons import lesson_of
from tests.stages.distill.planes import batch_of, context_of, divergence, net, planes, trained

SOURCES = {"wide.pt2": lambda: trained(24), "narrow.pt2": lambda: trained(8), "blank.pt2": lambda: net(9)}


def _config(*teachers: str | None, **changes: Any) -> EnsembleConfig:
    return EnsembleConfig.model_validate({"teachers": teachers or ("wide.pt2", "narrow.pt2"), **changes})


def _context(**changes: Any) -> Any:
    return context_of(load_source=lambda source: SOURCES[source](), **changes)


@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_the_gradient_follows_the_mean_of_the_probabilities(weight: float) -> None:
    x, labels = batch_of(9)
    outputs = torch.randn(9, 3, requires_grad=True)
    config = _config(temperature=3.0, weight=weight)
    lesson = lesson_of(trained(24), net(9))
    loss = ensemble_objective(lesson, config, weights=[0.7, 0.3], seed=0)(outputs, (x, labels))
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        first, second = (functional.softmax(each(x) / 3, 1) for each in (trained(24), net(9)))
        # Closed form of the gradient: (1 - a)(p - onehot)/N + a T (p_T - q_T)/N, q_T the mean of the teachers'.
        plain = functional.softmax(outputs, 1) - functional.one_hot(labels, 3)
        soft = 3.0 * (functional.softmax(outputs / 3, 1) - 0.7 * first - 0.3 * second)
    torch.testing.assert_close(outputs.grad, ((1 - weight) * plain + weight * soft) / 9)


class _Watched(Teacher):
    """A teacher that counts its calls."""

    calls = 0

    def __call__(self, batch: Any) -> Any:
        self.calls += 1
        return super().__call__(batch)


def test_only_the_teacher_that_is_drawn_runs() -> None:
    batch, config = batch_of(9), _config(mode="one_per_batch", weight=1.0, temperature=1.0)
    step = iter([*range(200), *range(200)])
    under_way = running(trained(), steps=lambda: next(step))
    teachers = [_Watched(model, Classification(), under_way) for model in (trained(24), trained(8), net(9))]
    objective = ensemble_objective(Lesson(Classification(), under_way, teachers), config, weights=[0.5, 0.5, 0], seed=3)
    outputs = torch.randn(9, 3)
    passes = [[float(objective(outputs, batch)) for _ in range(200)] for _ in range(2)]
    assert passes[0] == passes[1]  # the step alone decides
    calls = [teacher.calls for teacher in teachers]
    assert sum(calls) == 400
    assert calls[2] == 0
    assert min(calls[:2]) > 150
    assert len({round(value, 6) for value in passes[0]}) == 2


@pytest.mark.parametrize("mode", ["mean", "one_per_batch"])
def test_the_student_learns_from_all(mode: str) -> None:
    student, context = net(6), _context()
    learned = ensemble(student, _config(None, "narrow.pt2", mode=mode, weight=1.0), context)
    assert context.notes["teacher_weights"] == [0.5, 0.5]
    for teacher in (trained(24), trained(8)):
        assert divergence(learned, teacher) < 0.4 * divergence(student, teacher)
    plain = supervised(student, SupervisedConfig(), _context())
    by_one = soft_labels(student, SoftLabelsConfig(weight=1.0), _context())
    assert len({each.fingerprint() for each in (learned, plain, by_one)}) == 3


def test_twice_the_same_teacher_is_one_teacher() -> None:
    config = _config(None, "wide.pt2", weight=0.6, temperature=2.0)
    learned = ensemble(net(6), config, _context())
    by_one = soft_labels(net(6), SoftLabelsConfig(weight=0.6, temperature=2.0), _context())
    for name, value in by_one.state_dict().items():
        torch.testing.assert_close(learned.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_weights_by_val_are_the_inverse_of_the_loss() -> None:
    x, labels = next(iter(planes().val.batches(200)))  # type: ignore[misc]
    teachers = [trained(24), net(9)]
    with torch.no_grad():
        losses = [float(functional.cross_entropy(teacher(x), labels)) for teacher in teachers]
    weights = teacher_weights(teachers, _config(weights="val"), _context())
    assert weights == pytest.approx([losses[1] / sum(losses), losses[0] / sum(losses)], rel=1e-5)
    assert weights[0] > 0.6
    assert teacher_weights(teachers, _config(weights=[1, 3]), _context()) == [0.25, 0.75]


def test_a_loss_that_weighs_nothing_is_told() -> None:
    broken = net(9)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(StageError, match=r"weights[\s\S]*list"):
        teacher_weights([trained(), broken], _config(weights="val"), _context())


@pytest.mark.parametrize("mode", ["mean", "one_per_batch"])
def test_a_killed_training_ends_alike(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(workspace: Path) -> Model:
        config = _config(mode=mode, weights="val", trainer={"epochs": 2})
        return ensemble(net(6), config, _context(workspace=workspace))

    whole = run(tmp_path / "whole")
    killed = run_through_kills(lambda: run(tmp_path / "killed"), monkeypatch, saves={4, 15})
    assert killed.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    "content",
    [
        {"teachers": []},
        {"teachers": ["wide.pt2"]},
        {"weights": [1.0]},
        {"weights": [0.0, 0.0]},
        {"weights": [1.0, -1.0]},
        {"weights": "test"},
        {"mode": "all"},
        {"weight": 1.5},
        {"temperature": 0},
    ],
)
def test_settings_out_of_range_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        _config(**content)
