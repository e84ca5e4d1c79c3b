"""Segmentation against brute force."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mil_cli.errors import TaskError
from mil_cli.task.base import Task
from mil_cli.task.segmentation import Segmentation


def _batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        labels = torch.randint(0, 3, (2, 5, 6), generator=generator)
        labels[:, 0] = 255
        made.append((torch.randn(2, 3, 5, 6, generator=generator), labels))
    return made


def test_mean_iou_equals_sets_of_pixels() -> None:
    task = Segmentation(num_classes=3)
    assert isinstance(task, Task)
    metric = task.metric()
    found: dict[int, list[int]] = {label: [0, 0] for label in range(3)}
    for scores, labels in _batches():
        task.update(metric, scores, (None, labels))
        best = scores.argmax(1)
        for predicted, label in zip(best.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if label == 255:
                continue
            for klass in {predicted, label}:
                found[klass][1] += 1
            if predicted == label:
                found[label][0] += 1
    expected = sum(inter / union for inter, union in found.values()) / 3
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6)


def test_pixel_accuracy_and_loss_leave_ignored_pixels_out() -> None:
    task = Segmentation(num_classes=3, metric_kind="pixel_accuracy")
    scores, labels = _batches()[0]
    counted = labels != 255
    metric = task.metric()
    task.update(metric, scores, (None, labels))
    expected = (scores.argmax(1)[counted] == labels[counted]).float().mean()
    assert float(metric.compute()) == pytest.approx(float(expected))
    by_pixel = functional.cross_entropy(scores.permute(0, 2, 3, 1)[counted], labels[counted])
    torch.testing.assert_close(task.loss(scores, (None, labels)), by_pixel)


def test_distance_is_that_of_the_pixels() -> None:
    task = Segmentation(num_classes=3)
    scores, labels = _batches()[0]
    teacher = torch.randn_like(scores)
    counted = labels != 255
    student_pixels = scores.permute(0, 2, 3, 1)[counted] / 2
    teacher_pixels = teacher.permute(0, 2, 3, 1)[counted] / 2
    expected = 4 * functional.kl_div(
        functional.log_softmax(student_pixels, 1), functional.softmax(teacher_pixels, 1), reduction="batchmean"
    )
    torch.testing.assert_close(task.distance(scores, teacher, (None, labels), temperature=2.0), expected)
    channelled = (None, labels.unsqueeze(1))
    torch.testing.assert_close(task.distance(scores, teacher, channelled, temperature=2.0), expected)


def test_all_pixels_count_where_other_data_have_no_masks() -> None:
    task = Segmentation(num_classes=3)
    scores, labels = _batches()[0]
    teacher = torch.randn_like(scores)
    expected = task.distance(scores, teacher, (None, torch.zeros_like(labels)), temperature=2.0)
    by_image = torch.full((len(scores),), 255)
    torch.testing.assert_close(task.distance(scores, teacher, (None, by_image), temperature=2.0), expected)


@pytest.mark.parametrize(
    ("scores", "labels", "words"),
    [
        (torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 7), "run from 7 to 7"),
        (torch.randn(1, 3, 4, 4), torch.zeros(1, 5, 5, dtype=torch.long), "do not fit"),
        (torch.randn(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), "do not fit"),
        (torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4), "class indices"),
    ],
)
def test_what_does_not_fit_is_told(scores: torch.Tensor, labels: torch.Tensor, words: str) -> None:
    task = Segmentation(num_classes=3)
    with pytest.raises(TaskError, match=words):
        task.loss(scores, (None, labels))
    with pytest.raises(TaskError, match=words):
        task.update(task.metric(), scores, (None, labels))


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(TaskError, match="did you mean 'mean_iou'"):
        Segmentation(num_classes=2, metric_kind="mean_iu")
