"""Three classes of points between random planes: data that distillation is tested on in a moment."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig
from mil_cli.training.loop import fit
from tests.stages.contexts import make_context


class Net(nn.Module):
    def __init__(self, hidden: int, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Linear(5, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.body(x)))))  # type: ignore[no-any-return]


@cache
def _captured(hidden: int, classes: int) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(hidden)
        return Model.capture(Net(hidden, classes), (torch.randn(4, 5),))


def net(hidden: int, classes: int = 3) -> Model:
    """Return a model that knows nothing, always a copy of the same one."""
    return _captured(hidden, classes).clone()


@cache
def planes() -> Data:
    """Return 200 training samples; shared, so not to be changed."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 5, generator=generator)

    def split(samples: int) -> TensorSplit:
        x = torch.randn(samples, 5, generator=generator)
        return TensorSplit((x, (x @ directions.T).argmax(1)))

    return Data(name="planes", train=split(200), val=split(200), test=split(50))


@cache
def trained(hidden: int = 24) -> Model:
    """Return a model that knows the planes; shared, so not to be changed."""
    settings = TrainerConfig(epochs=10, batch_size=20, learning_rate=0.1)
    return fit(net(hidden), task=Classification(), data=planes(), settings=settings, seed=0).model


def context_of(**changes: Any) -> Context:
    """Return a context on the planes with four epochs and a trained model as the uncompressed one."""
    settings = TrainerConfig(epochs=4, batch_size=20, learning_rate=0.05, checkpoint_every_seconds=0)
    return make_context(**{"data": planes(), "original": trained(), "trainer": settings, **changes})


def batch_of(samples: int) -> tuple[Tensor, Tensor]:
    """Return the first training samples and their labels."""
    images, labels = next(iter(planes().train.batches(samples)))  # type: ignore[misc]
    return images, labels


def divergence(student: Model, teacher: Model) -> float:
    """Return KL(teacher || student) in nats, mean over val."""
    x, labels = next(iter(planes().val.batches(200)))  # type: ignore[misc]
    with torch.no_grad():
        return float(Classification().distance(student(x), teacher(x), (x, labels), temperature=1.0))
