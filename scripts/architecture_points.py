"""Trains one architecture of a designed space for the data set: the row of a point."""

from __future__ import annotations

from collections.abc import Mapping

from mil_cli.assess.scores.registry import MEASURES, SIZES
from mil_cli.device.host import detect
from mil_cli.models.user_code import importable
from mil_cli.recipe.schema import Recipe
from mil_cli.run.architectures import Clocks, Workplace, one_thread
from mil_cli.spaces.architecture import Chosen
from mil_cli.training.evaluate import evaluate
from scripts.comparison import Point, Result

SCORES = tuple(name for name in MEASURES if name not in SIZES)
SCORED_SEED = 0
"""Of the weights that are scored and of the samples: the scores of an architecture are in the row of this seed."""


def train_point(recipe: Recipe, drawn: Mapping[str, Mapping[str, Chosen]], point: Point) -> Result:
    """Train the architecture of a point on one thread, by the recipe's data, task and trainer.

    Args:
        recipe: Its model is the space.
        drawn: The choices of the architectures by their names.
        point: With ``architecture``, its name, and ``seed``, that of the weights, the order and the augmentation.

    Returns:
        ``choices``, the sizes, ``scores`` (in one row of each architecture), ``capture``, ``epochs``, ``quality`` on
        val (None if the training collapsed), ``test_quality``, ``processor``.
    """
    seed, choices = point["seed"], drawn[point["architecture"]]
    with one_thread(), importable(recipe.root):
        place = Workplace.of(recipe)
        module = place.build(choices, seed=seed)
        began = Clocks.now()
        model = place.capture(module)
        capture = began.until(Clocks.now())
        names = [*(SCORES if seed == SCORED_SEED else ()), *SIZES]
        scores = place.scores(model, names, seed=SCORED_SEED)
        sizes = {name: int(scores.pop(name)["value"]) for name in SIZES}
        training = place.train(model, recipe.trainer, seed=seed)
        test = None
        if training.quality is not None:
            test = evaluate(training.model, task=place.task, split=place.data.test, split_name="test").value
    return {
        "choices": dict(choices),
        **sizes,
        "scores": scores,
        "capture": capture,
        "epochs": training.epochs,
        "quality": training.quality,
        "test_quality": test,
        "processor": detect().processor,
    }
