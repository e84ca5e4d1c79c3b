"""A tiny model, data and stages for tests of the frame: everything but the methods is real."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.device.host import resolve
from mil_cli.errors import StageError
from mil_cli.events import SilentProgress
from mil_cli.graph.model import Model
from mil_cli.run.cache import Cache
from mil_cli.run.execute import CapturedModel, Executor
from mil_cli.stages.context import Context
from mil_cli.stages.registry import StageConfig, config_type, stage
from mil_cli.stages.surroundings import Surroundings
from mil_cli.task.classification import Classification
from mil_cli.training.config import TrainerConfig

RUNS: list[str] = []
"""The names of the stages that really ran, in order."""


class Scale(StageConfig):
    """Multiplies every weight, and reads what it is told to."""

    family: ClassVar[str] = "train"
    method: ClassVar[str] = "scale"

    factor: float = 2.0
    reads: tuple[str, ...] = ()
    fail_at: int | None = None
    refuses: str | None = None


@stage(Scale)
def scale(model: Model, config: Scale, context: Context) -> Model:
    RUNS.append(context.name)
    if config.refuses is not None:
        raise StageError("will not do", where=config.refuses)
    for read in config.reads:
        getattr(context.device if read == "preferred_multiple" else context, read)
    slot = context.slot()
    done = (slot.load() or {"done": 0})["done"]
    result = model.clone()
    for step in range(done, 3):
        if step == config.fail_at:
            raise RuntimeError("killed here")
        slot.save({"done": step + 1})
    context.note(first_step=done)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.mul_(config.factor)
    return result


def toy_data(seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)

    def split(samples: int) -> TensorSplit:
        features = torch.randn(samples, 4, generator=generator)
        return TensorSplit((features, (features[:, 0] > 0).long()))

    return Data(name="toy", train=split(64), val=split(32), test=split(32))


def toy_surroundings(**changes: Any) -> Surroundings:
    base: dict[str, Any] = {
        "seed": 0,
        "task": Classification(),
        "data": toy_data(),
        "device": resolve({"name": "host_cpu"}),
        "trainer": TrainerConfig(epochs=1, batch_size=16),
        "goals": {},
        "stages": {"train": config_type("train", "supervised")()},
        "load_source": lambda source: source,
        "source_fingerprint": str,
    }
    return Surroundings(**{**base, **changes})


def toy_model(seed: int = 0) -> CapturedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return CapturedModel(Model.capture(module, (torch.randn(3, 4),)))


def toy_executor(location: Path, *, fresh: bool = False, **changes: Any) -> Executor:
    progress = SilentProgress()
    return Executor(toy_surroundings(**changes), Cache(location, progress), fresh, progress)
