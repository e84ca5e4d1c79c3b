"""Classification against closed forms and brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from mil_cli.errors import TaskError
from mil_cli.task.base import Task
from mil_cli.task.classification import Classification


def test_is_a_task() -> None:
    assert isinstance(Classification(), Task)


def test_loss_is_minus_the_log_of_the_softmax_of_the_label() -> None:
    scores, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 3, 2, 1, 1, 0])
    by_hand = sum(
        math.log(sum(math.exp(float(value)) for value in row)) - float(row[label])
        for row, label in zip(scores, labels.tolist(), strict=True)
    )
    loss = Classification().loss(scores, (None, labels))
    assert float(loss) == pytest.approx(by_hand / 6, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_in_which_no_label_counts_changes_no_weight(smoothing: float) -> None:
    scores = torch.randn(4, 3, requires_grad=True)
    loss = Classification(label_smoothing=smoothing).loss(scores, (None, torch.full((4,), -100)))
    loss.backward()
    assert loss.item() == 0.0
    torch.testing.assert_close(scores.grad, torch.zeros(4, 3))


def test_label_smoothing_mixes_in_the_uniform_distribution() -> None:
    scores, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    logs = functional.log_softmax(scores, -1)
    target = functional.one_hot(labels, 3) * 0.8 + 0.2 / 3
    expected = -(target * logs).sum(-1).mean()
    assert float(Classification(label_smoothing=0.2).loss(scores, (0, labels))) == pytest.approx(float(expected))


@pytest.mark.parametrize("top_k", [1, 2])
def test_accuracy_equals_counting(top_k: int) -> None:
    task = Classification(top_k=top_k)
    metric = task.metric()
    right = total = 0
    for _ in range(3):
        scores, labels = torch.randn(17, 5), torch.randint(0, 5, (17,))
        labels[0] = -100
        task.update(metric, scores, (None, labels))
        for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
            if label >= 0:
                total += 1
                right += label in sorted(range(5), key=lambda c, row=row: -row[c])[:top_k]
    assert float(metric.compute()) == pytest.approx(right / total)


def test_tokens_are_classified_one_by_one_and_padding_is_left_out() -> None:
    task = Classification()
    scores, labels = torch.randn(2, 3, 4), torch.tensor([[1, 2, -100], [0, -100, -100]])
    flat = torch.stack([scores[0, 0], scores[0, 1], scores[1, 0]])
    expected = functional.cross_entropy(flat, torch.tensor([1, 2, 0]))
    torch.testing.assert_close(task.loss(scores, {"x": 0, "labels": labels}), expected)
    teacher = torch.randn(2, 3, 4)
    flat_teacher = torch.stack([teacher[0, 0], teacher[0, 1], teacher[1, 0]])
    expected = task.distance(flat, flat_teacher, (0, torch.tensor([1, 2, 0])), temperature=2.0)
    torch.testing.assert_close(task.distance(scores, teacher, {"labels": labels}, temperature=2.0), expected)
    every = task.distance(scores, teacher, {"labels": torch.zeros_like(labels)}, temperature=2.0)
    by_sample = {"labels": torch.full((2,), -100)}  # as data of another kind may have
    torch.testing.assert_close(task.distance(scores, teacher, by_sample, temperature=2.0), every)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distance_is_temperature_squared_times_the_divergence(temperature: float) -> None:
    student, teacher = torch.randn(7, 5), torch.randn(7, 5)
    total = 0.0
    for row_s, row_t in zip(student.double(), teacher.double(), strict=True):
        p = [math.exp(float(v) / temperature) for v in row_t]
        q = [math.exp(float(v) / temperature) for v in row_s]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    labels = torch.zeros(7, dtype=torch.long)
    distance = Classification().distance(student, teacher, (0, labels), temperature=temperature)
    assert float(distance) == pytest.approx(temperature**2 * total / 7, rel=1e-5)
    peer = functional.kl_div(
        functional.log_softmax(student / temperature, 1),
        functional.softmax(teacher / temperature, 1),
        reduction="batchmean",
    )
    torch.testing.assert_close(distance, peer * temperature**2)
    same = Classification().distance(teacher, teacher, (0, labels), temperature=temperature)
    assert float(same) == pytest.approx(0, abs=1e-6)


def test_the_gradient_of_the_distance_tends_to_the_difference_of_scores_at_high_temperature() -> None:
    # Hinton et al. 2015, eq. 4: for centred scores T^2 dKL/dz -> (z - v) / N.
    student = torch.randn(1, 6, dtype=torch.float64)
    teacher = torch.randn(1, 6, dtype=torch.float64)
    student, teacher = student - student.mean(), teacher - teacher.mean()
    student.requires_grad_()
    labels = torch.zeros(1, dtype=torch.long)
    Classification().distance(student, teacher, (0, labels), temperature=300.0).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 6, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize(
    ("scores", "labels", "words"),
    [
        (torch.randn(2, 3), torch.tensor([0, 3]), "labels run from 0 to 3"),
        (torch.randn(2, 3), torch.tensor([0, -1]), "labels run from -1 to 0"),
        (torch.randn(2, 3), torch.tensor([0.0, 1.0]), "must be class indices"),
        (torch.randn(3, 3), torch.tensor([0, 1]), "do not fit"),
        (torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long), "do not fit"),
        ({"a": torch.randn(2, 3), "b": torch.randn(2, 3)}, torch.tensor([0, 1]), "not clear"),
    ],
)
def test_what_does_not_fit_is_told(scores: Any, labels: torch.Tensor, words: str) -> None:
    task = Classification()
    with pytest.raises(TaskError, match=words):
        task.loss(scores, (None, labels))
    with pytest.raises(TaskError, match=words):
        task.update(task.metric(), scores, (None, labels))


def test_a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(TaskError, match="teacher"):
        Classification().distance(torch.randn(2, 3), torch.randn(2, 4), (0, torch.zeros(2).long()), temperature=1.0)


def test_the_fingerprint_follows_the_settings() -> None:
    assert Classification().fingerprint() == Classification().fingerprint()
    assert Classification().fingerprint() != Classification(label_smoothing=0.1).fingerprint()


@pytest.mark.parametrize(
    "settings", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"top_k": 0}, {"top_k": 2.5}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(TaskError):
        Classification(**settings)
