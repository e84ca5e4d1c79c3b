"""What is computed of one architecture: trainings that tell the same where they are the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mil_cli.models.small_nets import small_nets
from mil_cli.recipe.load import load_recipe
from mil_cli.run.architectures import Training
from mil_cli.run.parts import Job, Part, compute, foretold
from mil_cli.spaces import DesignedSpace
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


def test_a_partial_training_that_is_whole_says_what_the_whole_one_reaches(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    recipe = load_recipe(file)
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
