"""Ways to judge all architectures of a data set without training each to its end, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mil_cli.data.resized import Resized
from mil_cli.errors import MilError
from mil_cli.events import SilentProgress
from mil_cli.graph.model import Model
from mil_cli.models.user_code import importable
from mil_cli.recipe.schema import Recipe
from mil_cli.run.surroundings import build_surroundings, source_model
from mil_cli.spaces import Architecture, DesignedSpace
from mil_cli.spaces.architecture import Chosen
from mil_cli.stages.context import Context
from mil_cli.stages.judging import quality_or_worst
from mil_cli.stages.nas.one_shot import Judge, OneShotConfig
from mil_cli.stages.registry import config_type
from mil_cli.stages.surroundings import Surroundings
from mil_cli.training.batch_norm import recalibrate_module
from mil_cli.training.eager import EagerModule
from mil_cli.training.loop import fit
from scripts.comparison import Point, Result

_RECALIBRATED = 1024
"""Training samples from which batch norms take their statistics."""


@dataclass(frozen=True)
class Few:
    """Each architecture is trained for a few steps, and judged with statistics of its batch norms taken anew.

    Attributes:
        steps: How many; the learning rate's schedule is that of a whole training, shortened.
        samples: Of val, on which it is judged then.
        resolution: Share of the height and width of images on which it is trained and judged.
    """

    steps: int
    samples: int = 5000
    resolution: float = 1.0

    def surroundings(self, around: Surroundings) -> Surroundings:
        """Return what there is, with images of this resolution."""
        if self.resolution == 1:
            return around
        smaller = {name: Resized(getattr(around.data, name), self.resolution) for name in ("train", "val")}
        return replace(around, data=replace(around.data, **smaller))

    def judge(self, model: Model, recipe: Recipe, context: Context, drawn: Mapping[str, Architecture]) -> Result:
        """Return ``val`` and ``loss`` of each: quality on val, and minus the mean loss of the steps."""
        space = context.space()
        calls = list(context.calibration(samples=_RECALIBRATED, batch_size=64))
        found: dict[str, dict[str, float | None]] = {"val": {}, "loss": {}}
        evaluating = 0.0
        for name, architecture in drawn.items():
            start = EagerModule(space.build(architecture, seed=recipe.seed), spec=model.spec, samples=model.samples)
            result = fit(
                start,
                task=context.task,
                data=context.data,
                settings=recipe.trainer,
                seed=recipe.seed,
                steps=self.steps,
            )
            loss = sum(entry["train_loss"] for entry in result.history) / len(result.history)
            began = time.process_time()
            found["loss"][name] = -loss
            recalibrate_module(result.model.module, calls)  # moving averages of so few steps are those of the first
            found["val"][name] = quality_or_worst(result.model, context, samples=self.samples)
            evaluating += time.process_time() - began
        return {"values": found, "without": {"loss": evaluating}}


@dataclass(frozen=True)
class Shared:
    """All are judged on the weights of a supernet.

    Attributes:
        method: The method of the family nas that trains it.
        epochs: For how many.
    """

    method: str
    epochs: int

    def surroundings(self, around: Surroundings) -> Surroundings:
        """Return what there is."""
        return around

    def judge(self, model: Model, recipe: Recipe, context: Context, drawn: Mapping[str, Architecture]) -> Result:
        """Return ``val`` of each: quality on val with statistics of its own."""
        config = config_type("nas", self.method).model_validate({"trainer": {"epochs": self.epochs}})
        assert isinstance(config, OneShotConfig)
        judge = Judge(config.shared(model, context), config, context)
        return {"values": {"val": {name: judge(architecture) for name, architecture in drawn.items()}}, "without": {}}


ASSESSORS: dict[str, Few | Shared] = {
    **{f"steps_{steps}": Few(steps) for steps in (20, 40, 80, 160)},
    **{f"half_{steps}": Few(steps, resolution=0.5) for steps in (80, 160)},
    **{f"spos_{epochs}": Shared("spos", epochs) for epochs in (10, 30)},
    **{f"fairnas_{epochs}": Shared("fairnas", epochs) for epochs in (10,)},
    **{f"hypernetwork_{epochs}": Shared("hypernetwork", epochs) for epochs in (10,)},
}
"""By the name that tables have for them."""


def assess(recipe: Recipe, choices: Mapping[str, Mapping[str, Chosen]], point: Point) -> Result:
    """Judge all architectures by the method of a point, on one thread.

    Args:
        recipe: Its model is the space.
        choices: What was chosen in each, by its name.
        point: With ``method`` and ``seed``.

    Returns:
        ``values``: by the kind of value, of each architecture, larger being better; ``cpu_seconds`` of all of it;
        ``without``: by the kind of value, seconds of these that it does not need.
    """
    torch.set_num_threads(1)
    began = time.process_time()
    recipe = recipe.model_copy(update={"seed": point["seed"]})
    assessor = ASSESSORS[point["method"]]
    with importable(recipe.root), TemporaryDirectory(prefix="assess-") as temporary:
        around = assessor.surroundings(build_surroundings(recipe))
        model = source_model(recipe, around)
        context = Context(name="assess", surroundings=around, progress=SilentProgress(), workspace=Path(temporary))
        space = context.space()
        drawn = {name: _architecture(space, name, one) for name, one in choices.items()}
        found = assessor.judge(model, recipe, context, drawn)
        return {**found, "cpu_seconds": time.process_time() - began}


def _architecture(space: DesignedSpace, name: str, choices: Mapping[str, Chosen]) -> Architecture:
    try:
        return space.architecture(choices)
    except MilError as problem:
        problem.where = f"architecture {name} of the table"
        raise
