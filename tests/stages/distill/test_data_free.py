"""Distillation without data: it learns, reads nothing, ends alike after kills, and says what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.digits import digits
from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.graph.taps import Tapped
from mil_cli.models.resnet import resnet20
from mil_cli.stages.context import Context
from mil_cli.stages.distill.data_free import DataFreeConfig, data_free
from mil_cli.stages.distill.generator import Bank, Generator
from mil_cli.stages.distill.inversion import (
    NormStatistics,
    activation_loss,
    agreement,
    balance_loss,
    certainty_loss,
    last_features,
    variation,
)
from mil_cli.stages.distill.synthesis import Synthesis
from mil_cli.task.classification import Classification
from mil_cli.task.regression import Regression
from mil_cli.training.config import TrainerConfig
from mil_cli.training.evaluate import evaluate
from tests.stages.contexts import make_context, run_through_kills, running, trained_digits

TOY: dict[str, Any] = {
    "range": [-1.0, 1.0],
    "crop_padding": 1,
    "samples": 256,
    "warmup": 3,
    "width": 8,
    "noise": 16,
    "bank": 200,
}


@dataclass
class Unreadable:
    """A split that nobody may read."""

    reads: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        raise AssertionError("the split was asked for its length")

    def batches(self, batch_size: int, **options: Any) -> Iterator[Any]:
        raise AssertionError("the split was read")

    def fingerprint(self) -> str:
        raise AssertionError("the split was read for its fingerprint")


def _data() -> Data:
    return Data(name="digits", train=Unreadable(), val=digits().val, test=Unreadable())


@cache
def _captured(classes: int) -> Model:
    torch.manual_seed(5)
    net = resnet20(widths=[8, 16, 16], blocks=1, num_classes=classes).eval()
    return Model.capture(net, (torch.zeros(2, 1, 8, 8),))


def _student(classes: int = 10) -> Model:
    torch.manual_seed(5)
    return _captured(classes).clone()


def _context(**changes: Any) -> Context:
    settings = TrainerConfig(epochs=2, batch_size=64, learning_rate=0.05)
    return make_context(_data(), **{"original": trained_digits(), "trainer": settings, **changes})


def _accuracy(model: Model) -> float:
    return evaluate(model, task=Classification(), split=digits().val, split_name="val").value


@pytest.mark.slow
def test_a_student_learns_from_the_teacher_alone() -> None:
    """The recipe's train and test splits raise where they are touched."""
    context = _context(trainer=TrainerConfig(epochs=12, batch_size=64, learning_rate=0.05))
    teacher = trained_digits().fingerprint()
    config = DataFreeConfig.model_validate({**TOY, "samples": 2000, "warmup": 100, "bank": 2000, "flip": False})
    trained = data_free(_student(), config, context)
    assert _accuracy(trained) > 0.85
    assert not trained.training
    assert trained_digits().fingerprint() == teacher
    assert set(context.trace.reads) == {"original", "seed", "task", "trainer", "data/val"}
    history = cast("list[dict[str, Any]]", context.notes["history"])
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert context.notes["inputs_made"] == 12 * -(-31 // 4) * 64


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_the_generators_loss_is_the_weighted_sum_of_its_terms(alone: bool) -> None:
    """The student answers in evaluation mode, by the weights that it has now."""
    weights: dict[str, Any] = {"statistics_weight": 0.3, "first_norm_weight": 2.0, "class_weight": 0.7}
    weights |= {"variation_weight": 0.2, "magnitude_weight": 0.4, "activation_weight": 0.6, "balance_weight": 0.9}
    config = DataFreeConfig(**weights, generator_only=alone)
    teacher, student = trained_digits(), _student().train()
    synthesis = Synthesis(
        config,
        [Generator((1, 8, 8), classes=0 if alone else 10, noise=3, width=2, span=None)],
        Bank((1, 8, 8), capacity=4),
        teacher=teacher,
        scores=lambda outputs: outputs,
        call=lambda inputs: ((inputs,), {}),
        seed=0,
    )
    synthesis.begin(running(student))
    assert student.training
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
    x, labels = torch.randn(12, 1, 8, 8), torch.arange(12) % 10
    statistics = NormStatistics(teacher, first_weight=2.0)
    features = last_features(teacher)
    assert features is not None
    with torch.no_grad():
        scores, values = Tapped(teacher, {**statistics.taps, "features": features})(x)
        answers = student.clone().eval()(x)
        expected = 0.2 * variation(x) + 0.4 * x.square().mean() + 1.1 * agreement(answers, scores)
        if alone:
            expected += 0.7 * certainty_loss(scores) + 0.9 * balance_loss(scores)
            expected += 0.6 * activation_loss(values["features"])
        else:
            expected += 0.7 * nn.functional.cross_entropy(scores, labels) + 0.3 * statistics.distance(values)
        torch.testing.assert_close(synthesis.loss(x, labels, adversarial=1.1), expected)


@pytest.mark.slow
def test_a_killed_run_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainerConfig(epochs=3, batch_size=64, learning_rate=0.05, checkpoint_every_seconds=0)
    config = DataFreeConfig.model_validate({**TOY, "every": 2, "generators": 2})

    def run(workspace: Path) -> Model:
        return data_free(_student(), config, _context(trainer=settings, workspace=workspace))

    whole = run(tmp_path / "whole")
    killed = run_through_kills(lambda: run(tmp_path / "killed"), monkeypatch, saves={1, 2, 4, 7, 10})
    assert killed.fingerprint() == whole.fingerprint()


@pytest.mark.slow
def test_val_decides_nothing() -> None:
    """Early stopping is switched off: the last weights count, whatever val says."""
    settings = TrainerConfig(epochs=4, batch_size=64, learning_rate=0.05)
    results = []
    for patience in (None, 1):
        context = _context(trainer=settings.model_copy(update={"early_stopping": patience}))
        results.append(data_free(_student(), DataFreeConfig.model_validate(TOY), context).fingerprint())
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_student_learns_without_statistics_too() -> None:
    context = _context(trainer=TrainerConfig(epochs=8, batch_size=64, learning_rate=0.05))
    changes = {"samples": 2000, "warmup": 100, "bank": 2000, "flip": False, "adversarial_weight": 20.0}
    config = DataFreeConfig.model_validate({**TOY, **changes, "generator_only": True})
    assert _accuracy(data_free(_student(), config, context)) > 0.5


def _without_norms() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    return Model.capture(net, (torch.zeros(2, 1, 8, 8),))


def test_a_teacher_without_batch_norms_is_refused_with_the_way_out() -> None:
    with pytest.raises(StageError, match=r"stages\.stage\.teacher.*no batch norms") as caught:
        data_free(_student(), DataFreeConfig(), _context(original=_without_norms()))
    assert "generator_only: true" in str(caught.value)
    assert "unlabelled" in str(caught.value)
    config = DataFreeConfig.model_validate({**TOY, "generator_only": True})
    context = _context(original=_without_norms())
    before = _student()
    assert data_free(before, config, context).fingerprint() != before.fingerprint()


class _Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class _Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).mean(1)  # type: ignore[no-any-return]


def test_inputs_that_cannot_be_made_are_refused() -> None:
    two = Model.capture(_Two(), (torch.zeros(2, 4), torch.zeros(2, 4)))
    with pytest.raises(StageError, match=r"one tensor of floating-point numbers[\s\S]*unlabelled"):
        data_free(two, DataFreeConfig(), _context())
    tokens = Model.capture(_Embedded(), (torch.zeros(2, 5, dtype=torch.int64),))
    with pytest.raises(StageError, match=r"floating-point[\s\S]*unlabelled"):
        data_free(tokens, DataFreeConfig(), _context())


def test_a_task_without_classes_is_refused() -> None:
    with pytest.raises(StageError, match=r"one class per sample[\s\S]*unlabelled"):
        data_free(_student(), DataFreeConfig(), _context(task=Regression()))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    pixels = Model.capture(net, (torch.zeros(2, 1, 8, 8),))
    with pytest.raises(StageError, match=r"scores of shape[\s\S]*unlabelled"):
        data_free(pixels, DataFreeConfig(), _context(original=pixels))


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [Classification(), Classification(input_keys={"x": "image"}), Classification(input_keys=["x"], target_key="kind")],
)
def test_batches_have_the_form_that_the_task_reads(task: Classification) -> None:
    """Named inputs too: the model is then captured by keyword."""
    named = isinstance(task.input_keys, dict) or task.target_key is not None

    def capture(width: int) -> Model:
        torch.manual_seed(width)
        net = resnet20(width=width, blocks=1).eval()
        x = torch.zeros(2, 1, 8, 8)
        return Model.capture(net, (), {"x": x}) if named else Model.capture(net, (x,))

    keys = {"x": "image"} if isinstance(task.input_keys, dict) else {"x": "x"}

    class Renamed(Unreadable):
        def batches(self, batch_size: int, **options: Any) -> Iterator[Any]:
            for image, label in digits().val.batches(batch_size, **options):
                yield {keys["x"]: image, task.target_key or "labels": label} if named else (image, label)

        def __len__(self) -> int:
            return len(digits().val)

        def fingerprint(self) -> str:
            return "val"

    data = Data(name="digits", train=Unreadable(), val=Renamed(), test=Unreadable())
    settings = TrainerConfig(epochs=1, batch_size=64)
    context = make_context(data, original=capture(8), trainer=settings, task=task)
    student = capture(4)
    assert data_free(student, DataFreeConfig.model_validate(TOY), context).fingerprint() != student.fingerprint()


@pytest.mark.parametrize(
    "content",
    [{"range": [1, 0]}, {"range": [0, float("inf")]}, {"range": [-float("inf"), 0]}, {"every": 0}, {"bank": 0}],
)
def test_settings_out_of_range_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataFreeConfig.model_validate(content)
