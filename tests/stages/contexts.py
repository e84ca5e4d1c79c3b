"""A real context for tests of stages: everything around a stage but a recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mil_cli.data.base import Data
from mil_cli.data.digits import digits
from mil_cli.device.host import resolve
from mil_cli.events import Progress, SilentProgress
from mil_cli.graph.model import Model
from mil_cli.models.resnet import resnet20
from mil_cli.stages.context import Context
from mil_cli.stages.surroundings import Surroundings
from mil_cli.task.classification import Classification
from mil_cli.training.checkpoint import FileSlot
from mil_cli.training.config import TrainerConfig
from mil_cli.training.objective import Running


class Stored:
    """A model that is loaded only when it is needed, as the cache gives it."""

    fingerprint = "original"

    def __init__(self, model: Model) -> None:
        self._model = model

    def load(self) -> Model:
        return self._model


def make_context(
    data: Data,
    *,
    name: str = "stage",
    original: Model | None = None,
    workspace: Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Context:
    """Return a context of seed 0, classification and this machine, unless `changes` of its surroundings say else."""
    around: dict[str, Any] = {
        "seed": 0,
        "task": Classification(),
        "data": data,
        "device": resolve({"name": "host_cpu"}),
        "trainer": TrainerConfig(),
        "goals": {},
        "stages": {},
        "load_source": lambda source: pytest.fail("no source is needed"),
        "source_fingerprint": str,
        "original": None if original is None else Stored(original),
        **changes,
    }
    surroundings = Surroundings(**around)
    return Context(name=name, surroundings=surroundings, progress=progress or SilentProgress(), workspace=workspace)


def running(model: Model, **changes: Any) -> Running:
    """Return a training of `model` at its first step, as an objective sees it."""
    facts: dict[str, Any] = {
        "model": model,
        "steps": lambda: 0,
        "total_steps": 100,
        "forward": lambda graph, *args, **kwargs: graph(*args, **kwargs),
        "tapped": dict,
        "device": torch.device("cpu"),
        "channels_last": False,
        **changes,
    }
    return Running(**facts)


@cache
def trained_digits() -> Model:
    """Return a small ResNet that knows the digits; it is shared, so not to be changed."""
    torch.manual_seed(0)
    net = Model.capture(resnet20(width=16, blocks=1).eval(), (torch.randn(2, 1, 8, 8),))
    return make_context(digits()).finetune(net, stage=None, name="base", trainer={"epochs": 8})


class Notices(SilentProgress):
    """Keeps what a user would be told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def notice(self, text: str) -> None:
        self.told.append(text)


class Kill(Exception):
    """Stands for a kill."""


def run_through_kills(run: Callable[[], Model], monkeypatch: pytest.MonkeyPatch, saves: Collection[int]) -> Model:
    """Run a stage that is killed right after some of its saves, counted over all runs, and return what it ends with.

    Args:
        run: Runs the stage in a workspace that stays.
        monkeypatch: Puts the kills in.
        saves: After which saves; the run must come to each.
    """
    save, count = FileSlot.save, 0

    def kill(self: FileSlot, state: dict[str, Any]) -> None:
        nonlocal count
        save(self, copy.deepcopy(state))
        count += 1
        if count in saves:
            raise Kill

    with monkeypatch.context() as patched:
        patched.setattr(FileSlot, "save", kill)
        for _ in saves:
            with pytest.raises(Kill):
                run()
    return run()
