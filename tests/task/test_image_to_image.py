"""PSNR and the losses against the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from mil_cli.errors import TaskError
from mil_cli.task.base import Task
from mil_cli.task.image_to_image import ImageToImage


def test_psnr_is_the_mean_over_images() -> None:
    task = ImageToImage()
    assert isinstance(task, Task)
    metric = task.metric()
    values = []
    generator = torch.Generator().manual_seed(0)
    for count in (2, 1):
        target = torch.rand(count, 3, 6, 6, generator=generator)
        output = target + 0.1 * torch.randn(count, 3, 6, 6, generator=generator)
        task.update(metric, output, (None, target))
        for image, wanted in zip(output.clamp(0, 1), target, strict=True):
            values.append(10 * math.log10(1 / float(((image - wanted) ** 2).mean())))
    assert float(metric.compute()) == pytest.approx(sum(values) / 3, rel=1e-5)


def test_an_image_that_is_met_exactly_counts_a_hundred_decibels() -> None:
    target = torch.full((4, 1, 6, 6), 0.5)
    output = target + torch.tensor([0.0, 1e-6, 0.1, 0.1])[:, None, None, None]
    task = ImageToImage()
    metric = task.metric()
    task.update(metric, output, (None, target))
    assert float(metric.compute()) == pytest.approx((100 + 100 + 20 + 20) / 4, abs=1e-3)


def test_the_border_is_not_scored() -> None:
    target = torch.full((1, 1, 6, 6), 0.5)
    output = target + 0.1
    output[..., 0, :] = 9.0
    task = ImageToImage(border=1)
    metric = task.metric()
    task.update(metric, output, (None, target))
    assert float(metric.compute()) == pytest.approx(20.0, abs=1e-4)
    with pytest.raises(TaskError, match="leaves no pixel"):
        ImageToImage(border=3).update(metric, output, (None, target))


@pytest.mark.parametrize(
    ("kind", "expected"), [("l1", 0.25), ("mse", 0.0625), ("charbonnier", math.sqrt(0.0625 + 1e-6))]
)
def test_losses_of_a_constant_difference(kind: str, expected: float) -> None:
    output, target = torch.full((2, 1, 3, 3), 0.75), torch.full((2, 1, 3, 3), 0.5)
    assert float(ImageToImage(loss_kind=kind).loss(output, (None, target))) == pytest.approx(expected)
    distance = ImageToImage(loss_kind=kind).distance(output, target, (None, target), temperature=1.0)
    assert float(distance) == pytest.approx(0.25)


def test_a_loss_without_a_slope_is_refused() -> None:
    with pytest.raises(TaskError, match=r"task\.epsilon"):
        ImageToImage(loss_kind="charbonnier", epsilon=0.0)


def test_sizes_that_differ_are_told() -> None:
    with pytest.raises(TaskError, match="does not fit"):
        ImageToImage().loss(torch.zeros(1, 3, 4, 4), (None, torch.zeros(1, 3, 8, 8)))
