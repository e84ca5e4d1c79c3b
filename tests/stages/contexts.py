"""A real context for tests of stages: everything around a stage but a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mil_cli.data.base import Data
from mil_cli.device.host import resolve
from mil_cli.events import Progress, SilentProgress
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context, Surroundings
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig


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
