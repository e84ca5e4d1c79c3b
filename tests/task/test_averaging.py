"""Class scores of every task, and the mean of several models' outputs, against loops and closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from mil_cli.errors import TaskError
from mil_cli.task.base import Task
from mil_cli.task.classification import Classification
from mil_cli.task.ctc import Ctc
from mil_cli.task.denoising import Denoising
from mil_cli.task.image_to_image import ImageToImage
from mil_cli.task.regression import Regression
from mil_cli.task.segmentation import Segmentation
from mil_cli.task.source import build_task

WEIGHTS = (0.2, 0.5, 0.3)


def test_class_scores_of_tokens_leave_out_what_does_not_count() -> None:
    scores, labels = torch.randn(3, 4, 5), torch.randint(0, 5, (3, 4))
    labels[0, 1] = labels[2, 3] = -100
    found, known = Classification(output_key="logits").class_scores({"logits": scores}, (None, labels))
    wanted = [(i, j) for i in range(3) for j in range(4) if labels[i, j] != -100]
    assert known.tolist() == [int(labels[i, j]) for i, j in wanted]
    torch.testing.assert_close(found, torch.stack([scores[i, j] for i, j in wanted]), rtol=0, atol=0)


def test_class_scores_of_pixels_are_rows() -> None:
    scores, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[1, 2] = 255
    found, known = Segmentation(num_classes=3).class_scores(scores, (None, labels))
    assert found.shape == (35, 3)
    assert known.dtype == torch.int64
    loss = functional.cross_entropy(found, known)
    torch.testing.assert_close(loss, Segmentation(num_classes=3).loss(scores, (None, labels)))


def test_labels_out_of_range_are_told() -> None:
    with pytest.raises(TaskError, match="0 to 7"):
        Classification().class_scores(torch.randn(2, 3), (None, torch.tensor([0, 7])))


@pytest.mark.parametrize("task", [Ctc(), Regression(), ImageToImage(), Denoising()], ids=lambda task: task.name)
def test_tasks_without_labels_of_classes_name_the_way_out(task: Task) -> None:
    with pytest.raises(TaskError, match=rf"{task.name}[\s\S]*soft_labels"):
        task.class_scores(torch.randn(2, 3, 4), (None, torch.randn(2, 3, 4)))


CLASSES: list[tuple[Any, tuple[int, ...], int]] = [
    (Classification(), (6, 5), 1),
    (Classification(), (2, 3, 5), 2),
    (Segmentation(num_classes=5), (2, 5, 3, 4), 1),
    (Ctc(), (2, 7, 5), 2),
]


@pytest.mark.parametrize(("task", "shape", "axis"), CLASSES, ids=["samples", "tokens", "pixels", "frames"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_probabilities_are_averaged_not_logits(
    task: Task, shape: tuple[int, ...], axis: int, temperature: float
) -> None:
    # Logits of very different scale: their mean would follow the largest.
    outputs = [scale * torch.randn(shape) for scale in (1.0, 5.0, 30.0)]
    combined = task.combine(outputs, WEIGHTS, temperature=temperature)
    expected = sum(
        weight * functional.softmax(each.double() / temperature, axis)
        for weight, each in zip(WEIGHTS, outputs, strict=True)
    )
    torch.testing.assert_close(
        functional.softmax(combined.double() / temperature, axis), expected, rtol=1e-5, atol=1e-6
    )


def test_a_model_of_all_the_weight_is_the_combination() -> None:
    outputs = [torch.randn(4, 3) for _ in range(3)]
    combined = Classification().combine(outputs, (0.0, 1.0, 0.0), temperature=2.0)
    batch = (None, torch.zeros(4, dtype=torch.long))
    assert float(Classification().distance(outputs[1], combined, batch, temperature=2.0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("task", [Regression(), ImageToImage(), Denoising()], ids=lambda task: task.name)
def test_numbers_are_averaged(task: Task) -> None:
    outputs = [torch.randn(2, 3, 4, 4) for _ in range(3)]
    expected = sum(weight * each for weight, each in zip(WEIGHTS, outputs, strict=True))
    torch.testing.assert_close(task.combine(outputs, WEIGHTS, temperature=1.0), expected)


def test_the_form_of_the_outputs_stays() -> None:
    task = Classification(output_key="scores")
    outputs = [{"scores": torch.randn(4, 3), "features": torch.randn(4, 9)} for _ in range(2)]
    combined = task.combine(outputs, (0.5, 0.5), temperature=1.0)
    assert set(combined) == {"scores", "features"}
    batch = (None, torch.zeros(4, dtype=torch.long))
    distance = task.distance(outputs[0], combined, batch, temperature=1.0)
    alone = Classification().distance(outputs[0]["scores"], combined["scores"], batch, temperature=1.0)
    assert float(distance) == float(alone) > 0


def test_teachers_of_other_classes_are_told() -> None:
    with pytest.raises(TaskError, match=r"\(4, 2\)"):
        Classification().combine([torch.randn(4, 3), torch.randn(4, 2)], (0.5, 0.5), temperature=1.0)


def test_a_users_task_averages_all_its_outputs_unless_it_says_how(tmp_path: Path) -> None:
    text = "class {name}:\n    def loss(self, outputs, batch):\n        return outputs['a'].mean()\n"
    own = "    def combine(self, outputs, weights, *, temperature):\n        return outputs[1]\n"
    (tmp_path / "own_average_task.py").write_text(text.format(name="Plain") + text.format(name="Own") + own)
    outputs = [{"a": torch.randn(3, 2), "b": torch.randn(3), "count": 3} for _ in range(2)]
    plain = build_task({"_target_": "own_average_task.Plain"}, tmp_path)
    assert isinstance(plain, Task)
    mean = plain.combine(outputs, (0.25, 0.75), temperature=1.0)
    torch.testing.assert_close(mean["b"], 0.25 * outputs[0]["b"] + 0.75 * outputs[1]["b"])
    assert mean["count"] == 3
    with pytest.raises(TaskError, match="class_scores"):
        plain.class_scores(outputs[0], ())
    with pytest.raises(TaskError, match="differ in form"):
        plain.combine([outputs[0], {"a": torch.randn(3, 2)}], (0.5, 0.5), temperature=1.0)
    chosen = build_task({"_target_": "own_average_task.Own"}, tmp_path).combine(outputs, (0.5, 0.5), temperature=1.0)
    assert chosen is outputs[1]
