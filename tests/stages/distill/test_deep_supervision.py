"""Heads inside a model: their loss in closed form, where they sit, for any form of output; gone in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.graph.taps import tappable_paths
from mil_cli.models.resnet import resnet20
from mil_cli.models.vit import vit
from mil_cli.stages.distill.deep_supervision import (
    DeepSupervisionConfig,
    Head,
    Shape,
    deep_objective,
    deep_supervision,
    spread,
)
from mil_cli.stages.train.supervised import SupervisedConfig, supervised
from mil_cli.task.base import Task
from mil_cli.task.classification import Classification
from mil_cli.task.regression import Regression
from mil_cli.task.segmentation import Segmentation
from tests.stages.contexts import run_through_kills
from tests.stages.distill.lessons import lesson_of
from tests.stages.distill.planes import batch_of, context_of, net, trained


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_objective_is_that_of_the_paper(weight: float) -> None:
    x, labels = batch_of(9)
    outputs, values = torch.randn(9, 3, requires_grad=True), {"a": torch.randn(9, 4), "b": torch.randn(9, 6, 2, 2)}
    heads = nn.ModuleList([Head(Shape("pooled", 1, 4, 3)), Head(Shape("pooled", 1, 6, 3))])
    config = DeepSupervisionConfig(weight=weight, temperature=2.0)
    lesson = lesson_of(trained(), tapped=values)
    loss = deep_objective(lesson, config, heads=heads, paths=["a", "b"], place=0)(outputs, (x, labels))
    expected = functional.cross_entropy(outputs, labels)
    rows = [values["a"], values["b"].mean((2, 3))]
    for head, row in zip(heads, rows, strict=True):
        scores = head.layers(row)  # type: ignore[operator,union-attr]
        soft = functional.kl_div(
            functional.log_softmax(scores / 2, 1), functional.softmax(outputs / 2, 1), reduction="batchmean"
        )
        expected = expected + (1 - weight) * functional.cross_entropy(scores, labels) + weight * 4 * soft
    torch.testing.assert_close(loss, expected)
    # The heads learn from the outputs, not the other way round.
    loss.backward()  # type: ignore[no-untyped-call]
    plain = functional.softmax(outputs, 1) - functional.one_hot(labels, 3)
    torch.testing.assert_close(outputs.grad, plain.detach() / 9)
    assert all(parameter.grad is not None for parameter in heads.parameters())


@pytest.mark.slow
def test_heads_sit_at_even_depth_on_the_outermost_modules() -> None:
    residual = Model.capture(resnet20(width=16, blocks=3).eval(), (torch.randn(2, 1, 8, 8),))
    assert spread(residual, tappable_paths(residual), count=2) == ["stages.0", "stages.1"]
    transformer = Model.capture(vit(depth=4, dim=8, heads=2).eval(), (torch.randn(2, 1, 28, 28),))
    assert spread(transformer, tappable_paths(transformer), count=3) == ["blocks.0", "blocks.1", "blocks.2"]
    assert len(set(spread(residual, tappable_paths(residual), count=9))) == 9


def test_it_learns_and_the_heads_are_gone() -> None:
    student, context = net(6), context_of()
    learned = deep_supervision(student, DeepSupervisionConfig(heads=1), context)
    assert learned.state_dict().keys() == student.state_dict().keys()
    plain = supervised(student, SupervisedConfig(), context_of())
    assert learned.fingerprint() != plain.fingerprint()
    assert context.evaluate(learned).value > context.evaluate(student).value + 0.3
    assert (
        deep_supervision(student, DeepSupervisionConfig(heads=1), context_of()).fingerprint() == learned.fingerprint()
    )
    assert context.notes["heads"] in (["norm"], ["body"], ["dropout"])


def test_a_killed_training_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(workspace: Path) -> Model:
        config = DeepSupervisionConfig(at=("body",), trainer={"epochs": 2})
        return deep_supervision(net(6), config, context_of(workspace=workspace))

    whole = run(tmp_path / "whole")
    killed = run_through_kills(lambda: run(tmp_path / "killed"), monkeypatch, saves={3, 14})
    assert killed.fingerprint() == whole.fingerprint()


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.out = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        deep = torch.relu(self.down(x))
        return {"features": deep.mean((2, 3)), "out": self.out(torch.relu(self.up(deep)))}


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.embed(x)))  # type: ignore[no-any-return]


def _numbers() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))


Form = tuple[nn.Module, Task, Tensor, Tensor, str]


def _pixels() -> Form:
    images = torch.randn(24, 1, 8, 8)
    return Pixels(), Segmentation(num_classes=3), images, (images[:, 0] > 0).long(), "down"


def _tokens() -> Form:
    tokens = torch.randint(0, 7, (24, 4))
    return Tokens(), Classification(), tokens, tokens % 3, "block"


def _numbers() -> Form:
    rows = torch.randn(24, 5)
    module = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
    return module, Regression(), rows, rows.sum(1), "0"


@pytest.mark.parametrize("form", [_pixels, _tokens, _numbers])
def test_heads_give_outputs_of_any_form(form: Callable[[], Form]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, task, inputs, targets, path = form()
        model = Model.capture(module.eval(), (inputs[:4],))
    split = TensorSplit((inputs, targets))
    context = context_of(data=Data(name="toy", train=split, val=split, test=split), task=task)
    config = DeepSupervisionConfig(at=(path,), trainer={"epochs": 4, "batch_size": 8})
    learned = deep_supervision(model, config, context)
    history: Any = context.notes["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    automatic = deep_supervision(model, DeepSupervisionConfig(trainer={"epochs": 1, "batch_size": 8}), context)
    assert automatic.state_dict().keys() == learned.state_dict().keys()
    assert context.notes["heads"]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.first(x), self.second(x)


class Both(Classification):
    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return super().loss(outputs[0], batch) + super().loss(outputs[1], batch)


@pytest.mark.parametrize(("at", "words"), [(("bodi",), "did you mean 'body'"), (("transposed",), "no head can make")])
def test_modules_that_do_not_serve_are_told(at: tuple[str, ...], words: str) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.transposed, self.out = nn.Linear(5, 3), nn.Module(), nn.Linear(3, 3)
            self.transposed.forward = lambda x: x.T  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.transposed(self.body(x)).T)  # type: ignore[no-any-return]

    model = Model.capture(Turned(), (torch.randn(4, 5),))
    with pytest.raises(StageError, match=words):
        deep_supervision(model, DeepSupervisionConfig(at=at), context_of())


def test_a_loss_of_several_outputs_is_told() -> None:
    model = Model.capture(Two(), (torch.randn(4, 5),))
    with pytest.raises(StageError, match="reads 2 of them"):
        deep_supervision(model, DeepSupervisionConfig(), context_of(task=Both()))
    one = deep_supervision(model, DeepSupervisionConfig(trainer={"epochs": 1}), context_of(task=Classification()))
    assert one.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("content", [{"heads": 0}, {"weight": 1.2}, {"temperature": -1}, {"teacher": "a.pt2"}])
def test_settings_out_of_range_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DeepSupervisionConfig.model_validate(content)
