"""Regression against the formulas."""

from __future__ import annotations

import pytest
import torch

from mil_cli.errors import TaskError
from mil_cli.task.base import Task
from mil_cli.task.regression import Regression

OUTPUTS = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, -1.0])]
TARGETS = [torch.tensor([1.5, 2.0, 3.0]), torch.tensor([0.5, 1.0])]
ERRORS = [-0.5, 0.0, 1.0, -0.5, -2.0]
MEAN = (1.5 + 2 + 3 + 0.5 + 1) / 5
SPREAD = sum((value - MEAN) ** 2 for value in (1.5, 2, 3, 0.5, 1))


@pytest.mark.parametrize(
    ("kind", "expected", "higher"),
    [
        ("mse", sum(e * e for e in ERRORS) / 5, False),
        ("rmse", (sum(e * e for e in ERRORS) / 5) ** 0.5, False),
        ("mae", sum(abs(e) for e in ERRORS) / 5, False),
        ("r2", 1 - sum(e * e for e in ERRORS) / SPREAD, True),
    ],
)
def test_metrics_over_batches_of_different_sizes(kind: str, expected: float, higher: bool) -> None:
    task = Regression(metric_kind=kind)
    assert isinstance(task, Task)
    metric = task.metric()
    for output, target in zip(OUTPUTS, TARGETS, strict=True):
        task.update(metric, output.unsqueeze(1), (None, target))
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-5)
    assert task.higher_is_better is higher


@pytest.mark.parametrize(("kind", "expected"), [("mse", 1.25 / 3), ("mae", 0.5), ("huber", (0.125 + 0 + 0.5) / 3)])
def test_losses(kind: str, expected: float) -> None:
    assert float(Regression(loss_kind=kind).loss(OUTPUTS[0], (None, TARGETS[0]))) == pytest.approx(expected)


def test_distance_is_the_mean_square() -> None:
    task = Regression()
    distance = task.distance(OUTPUTS[0], TARGETS[0], (None, TARGETS[0]), temperature=3.0)
    assert float(distance) == pytest.approx(1.25 / 3)


def test_shapes_that_differ_are_told_instead_of_broadcast() -> None:
    with pytest.raises(TaskError, match="does not fit"):
        Regression().loss(torch.zeros(4, 2), (None, torch.zeros(4)))
    with pytest.raises(TaskError, match="did you mean 'huber'"):
        Regression(loss_kind="hubert")
