"""What tests of the training loop share: a slot that kills, a progress that counts, short settings."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mil_cli.graph.model import Model
from mil_cli.training.config import TrainerConfig


class Killed(Exception):
    """Stands for a kill."""


class Slot:
    """Keeps serialized states; kills when it is about to save for the n-th time, or just after."""

    def __init__(self, kill_at: int | None = None, *, after: bool = True) -> None:
        self.kill_at, self.after = kill_at, after
        self.saves = 0
        self.content: bytes | None = None

    def load(self) -> dict[str, Any] | None:
        return None if self.content is None else torch.load(io.BytesIO(self.content), weights_only=True)

    def save(self, state: dict[str, Any]) -> None:
        self.saves += 1
        if self.saves == self.kill_at and not self.after:
            raise Killed
        stream = io.BytesIO()
        torch.save(state, stream)
        self.content = stream.getvalue()
        if self.saves == self.kill_at:
            raise Killed

    def clear(self) -> None:
        self.content = None


class Recorder:
    """Progress that counts and keeps its notices."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.done = 0
        self.total: int | None = None

    @contextmanager
    def work(self, description: str, total: int | None = None, *, done: int = 0) -> Iterator[Recorder]:
        self.total = total
        self.done += done
        yield self

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        self.done += steps

    def notice(self, text: str) -> None:
        self.notices.append(text)


def short_settings(**changes: Any) -> TrainerConfig:
    """Return settings of three epochs with a checkpoint at every step, and changes to them."""
    return TrainerConfig.model_validate(
        {"epochs": 3, "batch_size": 16, "learning_rate": 0.05, "checkpoint_every_seconds": 0, **changes}
    )


def same_weights(left: Model, right: Model) -> bool:
    """Whether two models have the same tensors, to the bit."""
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
