"""Distillation on other data: it learns from any inputs, uses no label, and does not read the recipe's train split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mil_cli.data.base import Data
from mil_cli.data.digits import digits
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.distill.unlabelled import UnlabelledConfig, unlabelled
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from mil_cli.training.evaluate import evaluate
from tests.stages.contexts import make_context, run_through_kills, trained_digits

SETTINGS = {"_target_": "other"}


class _Unreadable:
    def __len__(self) -> int:
        raise AssertionError("the split was asked for its length")

    def batches(self, batch_size: int, **options: Any) -> Iterator[Any]:
        raise AssertionError("the split was read")

    def fingerprint(self) -> str:
        raise AssertionError("the split was read for its fingerprint")


def _other(*, size: int = 8, channels: int = 1, labels: int = 0, samples: int = 600) -> Data:
    """Crops of noise that was smoothed: no digits, and labels that mean nothing."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(samples, channels, size // 2, size // 2, generator=generator)
    images = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").clamp(-1, 1) * 1.5
    split = TensorSplit((images, torch.full((samples,), labels)))
    return Data(name="noise", train=split, val=_Unreadable(), test=_Unreadable())


def _student() -> Model:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 10)
    ).eval()
    return Model.capture(net, (torch.zeros(2, 1, 8, 8),))


def _context(other: Data, **changes: Any) -> Context:
    data = Data(name="digits", train=_Unreadable(), val=digits().val, test=_Unreadable())
    settings = TrainerConfig(epochs=6, batch_size=64, learning_rate=0.02)
    around = {"original": trained_digits(), "trainer": settings, "load_data": lambda _: other}
    return make_context(data, **{**around, **changes})


def _run(other: Data, **changes: Any) -> Model:
    return unlabelled(_student(), UnlabelledConfig(data=SETTINGS), _context(other, **changes))


def test_a_student_learns_digits_from_noise() -> None:
    context = _context(_other(samples=1500))
    trained = unlabelled(_student(), UnlabelledConfig(data=SETTINGS), context)
    before, after = (
        evaluate(model, task=Classification(), split=digits().val, split_name="val").value
        for model in (_student(), trained)
    )
    assert before < 0.25
    assert after > 0.4
    read = set(context.trace.reads)
    assert 'other_data/{"_target_": "other"}' in read
    assert "data/train" not in read


@pytest.mark.slow
def test_labels_do_not_count() -> None:
    assert _run(_other(labels=0)).fingerprint() == _run(_other(labels=9)).fingerprint()


def test_images_of_another_size_in_colour_are_adapted() -> None:
    before = _student().fingerprint()
    assert _run(_other(size=12, channels=3)).fingerprint() != before


def test_other_data_change_the_trace() -> None:
    one, other = _context(_other()), _context(_other(samples=500))
    for context in (one, other):
        unlabelled(_student(), UnlabelledConfig(data=SETTINGS, trainer={"epochs": 1}), context)
    assert one.trace.reads != other.trace.reads


def test_a_killed_run_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainerConfig(epochs=2, batch_size=64, learning_rate=0.02, checkpoint_every_seconds=0)
    whole = _run(_other(), trainer=settings, workspace=tmp_path / "whole")
    killed = run_through_kills(
        lambda: _run(_other(), trainer=settings, workspace=tmp_path / "killed"), monkeypatch, saves={2, 11}
    )
    assert killed.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ((torch.zeros(4, 1, 8), torch.zeros(4)), r"float32 \(4, 1, 8\)|\(2, 1, 8\)"),
        ((torch.zeros(4, 2, 8, 8), torch.zeros(4)), r"float32 \(2, 2, 8, 8\)|2 channels"),
        ((torch.zeros(4, 1, 8, 8, dtype=torch.int64), torch.zeros(4)), r"int64 \(2, 1, 8, 8\)"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(4, 1), torch.zeros(4)), "form"),
    ],
)
def test_data_that_do_not_fit_are_refused_with_the_way_out(tensors: tuple[torch.Tensor, ...], problem: str) -> None:
    split = TensorSplit(tensors)
    other = Data(name="other", train=split, val=split, test=split)
    colour = Model.capture(
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 10)), (torch.zeros(2, 3, 8, 8),)
    )
    model = colour if tensors[0].ndim == 4 and tensors[0].shape[1] == 2 else _student()
    with pytest.raises(StageError, match=r"stages\.stage\.data: these data do not fit the model") as caught:
        unlabelled(model, UnlabelledConfig(data=SETTINGS), _context(other))
    assert caught.value.hint
    assert re.search(problem, str(caught.value))
