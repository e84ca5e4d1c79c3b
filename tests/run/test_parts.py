"""What is computed of one architecture: trainings that tell the same where they are the same."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mil_cli.data.base import Data
from mil_cli.data.tensors import TensorSplit
from mil_cli.errors import DataError, ModelError
from mil_cli.models.small_nets import small_nets
from mil_cli.models.staged import Staged
from mil_cli.recipe.load import load_recipe
from mil_cli.recipe.schema import Recipe
from mil_cli.run import architectures
from mil_cli.run.architectures import Training, Workplace
from mil_cli.run.parts import Job, Part, compute, foretold
from mil_cli.spaces import CostCounter, DesignedSpace
from mil_cli.training.config import TrainerConfig

RECIPE = """\
defaults:
  - /mil/defaults
  - /data: digits
  - /task: classification
  - /device: host_cpu
  - _self_
model: {_target_: mil_cli.models.small_nets.small_nets, widths: [[4], [8], [8]], blocks: [1, 1, 1]}
trainer: {epochs: 5, batch_size: 64, learning_rate: 0.3}
rank: {}
"""


def recipe_in(folder: Path) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return load_recipe(file)


def test_a_partial_training_that_is_whole_says_what_the_whole_one_reaches(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    space = DesignedSpace(small_nets(widths=[[4], [8], [8]], blocks=[1, 1, 1]))
    trainer = recipe.trainer
    patient = TrainerConfig.model_validate(trainer.merged({"early_stopping": 2}))
    job = Job(
        space.smallest,
        (
            Part("naswot"),
            Part("partial", trainer, foretells=5),
            Part("training", trainer),
            Part("shorter", TrainerConfig.model_validate(trainer.merged({"epochs": 3})), samples=256, foretells=5),
            Part("patient", patient),
        ),
        seed=3,
    )
    score, partial, whole, shorter, stopped = compute(recipe, job)
    assert math.isfinite(score["value"])
    assert partial["val"] == whole["quality"] > 0.2
    assert partial["extrapolated"] == pytest.approx(partial["val"], abs=0.1)  # there is no later epoch
    assert "extrapolated" not in shorter
    assert partial["sum_of_losses"] < 0
    assert shorter["val"] < partial["val"]
    assert stopped["quality"] >= whole["quality"]
    assert all(result["cpu_seconds"] > 0 for result in (score, partial, whole, shorter, stopped))


def test_a_partial_training_on_smaller_images_sees_them_throughout_and_costs_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[bool, int, int]] = set()
    forward, fit = Staged.forward, architectures.fit

    def seeing(self: Staged, x: Tensor) -> Tensor:
        seen.add((self.training, *x.shape[2:]))
        return forward(self, x)

    def fitting(*args: Any, **options: Any) -> Any:
        seen.clear()  # what went before is no training
        return fit(*args, **options)

    monkeypatch.setattr(Staged, "forward", seeing)
    monkeypatch.setattr(architectures, "fit", fitting)
    recipe = recipe_in(tmp_path)
    space = DesignedSpace(small_nets(widths=[[4], [8], [8]], blocks=[1, 1, 1]))
    (low,) = compute(recipe, Job(space.smallest, (Part("partial", recipe.trainer, None, 5, resolution=0.5),), seed=3))
    assert seen == {(True, 4, 4), (False, 4, 4)}
    assert low["val"] > 0.15  # by chance it would be 0.1
    whole, small = (CostCounter(space, (torch.zeros(1, 1, side, side),)).macs(space.largest) for side in (8, 4))
    assert small < 0.5 * whole


def test_what_does_not_take_smaller_images_is_refused(tmp_path: Path) -> None:
    place = Workplace.of(recipe_in(tmp_path))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ModelError, match=r"cannot be trained on images of 4 x 4") as caught:
        place.check_resolution(flat, 0.5)
    assert caught.value.where == "rank.partial.resolution"
    assert "AdaptiveAvgPool2d" in str(caught.value.hint)
    vectors = TensorSplit((torch.randn(8, 64), torch.arange(8)))
    data = Data(name="vectors", train=vectors, val=vectors, test=vectors)
    with pytest.raises(DataError, match="no input is a batch of images"):
        replace(place, data=data).check_resolution(flat, 0.5)


def test_a_part_is_known_by_all_that_decides_what_comes_of_it() -> None:
    trainer = TrainerConfig()
    longer = trainer.model_copy(update={"epochs": 11})
    parts = [
        Part("naswot"),
        Part("synflow"),
        Part("training", trainer),
        Part("training", longer),
        Part("training", trainer, samples=9),
        Part("training", trainer, foretells=20),
        Part("training", trainer, resolution=0.5),
    ]
    assert len({str(part.key()) for part in parts}) == len(parts)


def test_a_curve_is_continued_to_the_end_of_the_whole_training() -> None:
    def law(epoch: int) -> float:
        return 0.9 - 0.5 * epoch**-0.7

    epochs = [{"train_loss": 2.0 / epoch, "val": law(epoch)} for epoch in range(1, 7)]
    training = Training(epochs, epochs[-1]["val"], None)  # type: ignore[arg-type]
    found = foretold(training, 20, higher_is_better=True)
    assert found["val"] == law(6)
    assert found["sum_of_losses"] == pytest.approx(-2.0 * sum(1 / epoch for epoch in range(1, 7)))
    assert found["extrapolated"] == pytest.approx(law(20), abs=1e-4)
    assert foretold(training, 20, higher_is_better=False)["val"] == -law(6)
    assert foretold(Training(epochs, None, None), 20, higher_is_better=True) == {}  # type: ignore[arg-type]
