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


@pytest.mark.parametrize(("scale", "offset"), [(1e-4, 0.0), (1.0, 2000.0)])
def test_r2_holds_for_targets_of_any_scale_and_offset(scale: float, offset: float) -> None:
    from sklearn.metrics import r2_score  # type: ignore[import-untyped]

    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2000, generator=generator) * scale + offset
    output = target + torch.randn(2000, generator=generator) * 0.5 * scale
    task = Regression(metric_kind="r2")
    metric = task.metric()
    for part in torch.arange(2000).split(64):
        task.update(metric, output[part], (None, target[part]))
    assert float(metric.compute()) == pytest.approx(r2_score(target.double(), output.double()), abs=1e-6)


@pytest.mark.parametrize(("output", "expected"), [(0.3, 1.0), (0.4, 0.0)])
@pytest.mark.parametrize("samples", [1, 7])
def test_r2_of_equal_targets_is_whether_they_are_met(output: float, expected: float, samples: int) -> None:
    task = Regression(metric_kind="r2")
    metric = task.metric()
    task.update(metric, torch.full((samples,), output), (None, torch.full((samples,), 0.3)))
    assert float(metric.compute()) == expected


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
