"""How often two models predict the same class: counted over all batches, nothing where there are no classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mil_cli.errors import TaskError
from mil_cli.run import agreement
from mil_cli.run.agreement import Predictions
from mil_cli.task.base import Task
from mil_cli.task.classification import Classification
from mil_cli.task.regression import Regression
from mil_cli.task.segmentation import Segmentation


def watched(task: Task, *outputs: Tensor) -> Predictions:
    predictions = Predictions(task)
    for each in outputs:
        labels = torch.zeros(each.shape[0], *each.shape[2:], dtype=torch.int64)
        predictions.watch(each, (None, labels))
    return predictions


def test_the_share_is_that_of_all_batches() -> None:
    first, second = torch.eye(4), torch.eye(4)[:2]
    one, other = (watched(Classification(), each, second) for each in (first, first.roll(1, 0)))
    assert one.agreement(one) == 1
    assert one.agreement(other) == 2 / 6


def test_pixels_count_each_until_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_MOST", 20)
    same = torch.rand(1, 3, 4, 4)
    different = same.roll(1, 1)
    one = watched(Segmentation(num_classes=3), same, same, different)
    other = watched(Segmentation(num_classes=3), same, different, same)
    assert one.agreement(other) == 0.5


def test_there_is_none_without_classes_and_none_of_a_task_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.eye(4)
    no_classes = watched(Regression(), scores)
    assert no_classes.agreement(no_classes) is None
    assert no_classes.problem is None
    fine = watched(Classification(), scores, scores)

    def fails(*_: Any) -> None:
        raise TaskError("no such class")

    broken = watched(Classification(), scores)
    monkeypatch.setattr(Classification, "class_scores", fails)
    broken.watch(scores, (None, torch.zeros(4, dtype=torch.int64)))
    assert str(broken.problem) == "no such class"
    assert fine.agreement(broken) is None
    assert broken.agreement(fine) is None
