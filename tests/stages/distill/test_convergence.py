"""The plain training beside a distilled one, and the steps that each needs to reach a quality."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from mil_cli.data.digits import digits
from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.stages.distill.convergence import after, compare, steps_to
from mil_cli.stages.distill.soft_labels import SoftLabelsConfig, soft_labels
from mil_cli.stages.train.supervised import SupervisedConfig, supervised
from mil_cli.training.config import TrainerConfig
from mil_cli.training.loop import FitResult
from tests.stages.contexts import make_context, trained_digits


def _result(values: list[float], seconds: float = 1.0) -> FitResult:
    history = [
        {"epoch": index + 1, "steps": 10 * (index + 1), "train_loss": 0.0, "val": value}
        for index, value in enumerate(values)
    ]
    return FitResult(model=cast("Model", None), history=history, stopped=None, seconds=seconds)


def test_steps_to_a_quality_are_read_off_both_curves() -> None:
    facts = compare(_result([0.2, 0.82, 0.9]), _result([0.0, 0.5, 0.8], 0.5), higher_is_better=True)
    assert facts["distilled"] == [[10, 0.2], [20, 0.82], [30, 0.9]]
    assert facts["reached"][-1] == {"quality": 0.8, "steps": 20, "plain_steps": 30}
    assert [level["quality"] for level in facts["reached"]] == pytest.approx([0.72, 0.76, 0.8])
    assert (facts["seconds"], facts["plain_seconds"]) == (1.0, 0.5)


def test_the_last_quality_is_reached_by_the_training_that_gave_it() -> None:
    for first, last in ((0.1, 0.7), (0.3, 0.9), (0.13, 0.8312)):
        facts = compare(_result([first, last]), _result([first, last]), higher_is_better=True)
        assert facts["reached"][-1] == {"quality": last, "steps": 20, "plain_steps": 20}
    flat = compare(_result([0.5, 0.5]), _result([0.5, 0.5]), higher_is_better=True)
    assert flat["reached"] == [{"quality": 0.5, "steps": 10, "plain_steps": 10}]


def test_trainings_before_count_with_their_steps_and_seconds() -> None:
    chain = after([_result([0.1, 0.2], 3.0), _result([0.3], 4.0)], _result([0.7, 0.8], 1.0))
    facts = compare(chain, _result([0.2, 0.8]), higher_is_better=True)
    assert facts["distilled"] == [[40, 0.7], [50, 0.8]]
    assert facts["seconds"] == 8.0
    assert facts["reached"][-1] == {"quality": 0.8, "steps": 50, "plain_steps": 20}
    assert after([], chain) == chain


def test_where_lower_is_better_the_quality_falls() -> None:
    facts = compare(_result([9.0, 3.0, 2.5]), _result([10.0, 4.0, 2.0]), higher_is_better=False)
    assert facts["reached"][-1] == {"quality": 2.0, "steps": None, "plain_steps": 30}
    assert facts["reached"][0]["quality"] == pytest.approx(2.8)
    assert steps_to([[5, 3.0], [10, 1.0]], 2.0, higher_is_better=False) == 10


def _net(hidden: int, classes: int = 10) -> Model:
    torch.manual_seed(hidden)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    return Model.capture(net, (torch.rand(4, 1, 8, 8),))


@pytest.mark.slow
def test_the_twin_is_the_students_plain_training() -> None:
    settings = TrainerConfig(epochs=3, batch_size=64, learning_rate=0.05)
    context = make_context(digits(), original=trained_digits(), trainer=settings)
    soft_labels(_net(12), SoftLabelsConfig(beside_plain=True), context)
    facts = cast("dict[str, Any]", context.notes["convergence"])
    history = cast("list[dict[str, Any]]", context.notes["history"])
    assert facts["distilled"] == [[entry["steps"], entry["val"]] for entry in history]
    alone = make_context(digits(), original=trained_digits(), trainer=settings)
    supervised(_net(12), SupervisedConfig(), alone)
    history = cast("list[dict[str, Any]]", alone.notes["history"])
    assert facts["plain"] == [[entry["steps"], entry["val"]] for entry in history]


def test_another_student_takes_the_models_place() -> None:
    settings = TrainerConfig(epochs=1, batch_size=64)
    sources = {"student.pt2": _net(9), "wide.pt2": _net(9, classes=11)}
    context = make_context(
        digits(), original=trained_digits(), trainer=settings, load_source=sources.__getitem__, name="recover"
    )
    model = _net(20)
    trained = soft_labels(model, SoftLabelsConfig(student="student.pt2"), context)
    assert trained.num_params() == _net(9).num_params()
    assert trained.spec.inputs == model.spec.inputs
    assert sources["student.pt2"].fingerprint() == _net(9).fingerprint()
    with pytest.raises(StageError, match=r"stages.recover.student.*wide.pt2|take the model's place"):
        soft_labels(model, SoftLabelsConfig(student="wide.pt2"), context)


def test_fine_tuning_by_a_distillation_keeps_its_own_model() -> None:
    config = SoftLabelsConfig(student="student.pt2", beside_plain=True, trainer={"epochs": 1})
    context = make_context(digits(), original=trained_digits(), stages={"recover": config})
    model = _net(20)
    trained = context.finetune(model, stage="recover", name="round")
    assert trained.num_params() == model.num_params()
    assert "convergence" not in context.notes
