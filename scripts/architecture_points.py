"""Trains one architecture of a designed space, and notes what it cost and what was known of it before."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch

from mil_cli.assess.scores.registry import MEASURES, score
from mil_cli.data.base import Batch, Data, Split
from mil_cli.data.source import build_data
from mil_cli.device.host import detect
from mil_cli.graph.model import Model
from mil_cli.models.source import build_module
from mil_cli.models.user_code import importable
from mil_cli.recipe.schema import Recipe
from mil_cli.run.surroundings import EXAMPLE_BATCH
from mil_cli.spaces import DesignedSpace
from mil_cli.spaces.architecture import Chosen
from mil_cli.task.base import Task
from mil_cli.task.source import build_task
from mil_cli.training.evaluate import evaluate
from mil_cli.training.loop import fit
from scripts.comparison import Point, Result

SIZES = ("macs", "params")
SCORES = tuple(name for name in MEASURES if name not in SIZES)
SCORED_SAMPLES = 64
"""Of each of the batches that scores look at."""
SCORED_SEED = 0
"""Of the weights that are scored and of the samples: the scores of an architecture are in the row of this seed."""


class Clocks(NamedTuple):
    """Seconds from any zero.

    Attributes:
        wall: Time that passes.
        cpu: Processor time of this process, over all its threads.
    """

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Clocks:
        """Read them."""
        return cls(time.perf_counter(), time.process_time())

    def until(self, end: Clocks) -> dict[str, float]:
        """Return the seconds from here to a later reading, by the names that results have for them."""
        return {"wall_seconds": round(end.wall - self.wall, 6), "cpu_seconds": round(end.cpu - self.cpu, 6)}


@dataclass
class _Timed:
    """A split that notes when each pass over it begins."""

    split: Split
    began: list[Clocks]

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, batch_size: int, **options: Any) -> Iterator[Batch]:
        self.began.append(Clocks.now())
        return self.split.batches(batch_size, **options)

    def fingerprint(self) -> str:
        return self.split.fingerprint()


def space_of(recipe: Recipe) -> DesignedSpace:
    """Return the space that a recipe's model is.

    Raises:
        ModelError: The model cannot be built, or holds no choice.
    """
    return DesignedSpace(build_module(recipe.model, root=recipe.root, seed=0))


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
    torch.set_num_threads(1)
    seed, choices = point["seed"], drawn[point["architecture"]]
    with importable(recipe.root):
        data, task = build_data(recipe.data, root=recipe.root), build_task(recipe.task, root=recipe.root)
        space = space_of(recipe)
        module = space.build(space.architecture(choices), seed=seed)
        args, kwargs = task.inputs(next(data.train.batches(EXAMPLE_BATCH)))
        began = Clocks.now()
        model = Model.capture(module, args, kwargs)
        capture = began.until(Clocks.now())
        sizes, scores = _scores(model, task, data, scored=seed == SCORED_SEED)
        epochs, trained = _epochs(recipe, model, task, data, seed)
        quality = epochs[-1].get("val")
        test = evaluate(trained, task=task, split=data.test, split_name="test").value if quality is not None else None
    return {
        "choices": dict(choices),
        **sizes,
        "scores": scores,
        "capture": capture,
        "epochs": epochs,
        "quality": quality,
        "test_quality": test,
        "processor": detect().processor,
    }


def _scores(
    model: Model, task: Task, data: Data, *, scored: bool
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    batches = list(islice(data.train.batches(SCORED_SAMPLES, shuffle=True, seed=SCORED_SEED), 2))
    names = [*(SCORES if scored else ()), *SIZES]
    found = score(model, names, task=task, batches=batches, seed=SCORED_SEED)
    scores = {
        name: {"value": one.value, "wall_seconds": round(one.seconds, 6), "cpu_seconds": round(one.cpu_seconds, 6)}
        for name, one in found.items()
        if name not in SIZES
    }
    return {name: int(found[name].value) for name in SIZES}, scores


def _epochs(recipe: Recipe, model: Model, task: Task, data: Data, seed: int) -> tuple[list[dict[str, Any]], Model]:
    """Train; return each epoch's loss, quality on val and seconds, and the model."""
    train, val = _Timed(data.train, []), _Timed(data.val, [])
    timed = replace(data, train=train, val=val)
    result = fit(model, task=task, data=timed, settings=recipe.trainer, seed=seed)
    spans = _spans(train.began, val.began, Clocks.now())
    epochs = []
    for entry, (training, validation) in zip(result.history, spans, strict=True):
        known = {key: entry[key] for key in ("train_loss", "val") if key in entry and math.isfinite(entry[key])}
        epochs.append({**known, "training": training, "validation": validation})
    return epochs, result.model


def _spans(
    train: Sequence[Clocks], val: Sequence[Clocks], end: Clocks
) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """Yield the seconds of each epoch's training and validation; one that collapsed was not evaluated."""
    stops, ends = [*val, end][: len(train)], [*train[1:], end]
    for start, stop, last in zip(train, stops, ends, strict=True):
        yield start.until(stop), stop.until(last)
