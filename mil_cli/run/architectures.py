"""Assesses and trains single architectures of a designed space, and notes what each step cost."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from mil_cli.assess.scores.registry import score
from mil_cli.data.base import Batch, Data, Split
from mil_cli.data.resized import Resized, is_image
from mil_cli.data.shortened import Shortened
from mil_cli.data.source import build_data
from mil_cli.errors import DataError, MilError, ModelError
from mil_cli.events import Progress
from mil_cli.graph.model import Model
from mil_cli.models.source import ModelSource, capture_module
from mil_cli.run.surroundings import EXAMPLE_BATCH, example_of, space_of
from mil_cli.spaces import DesignedSpace
from mil_cli.spaces.architecture import Chosen
from mil_cli.task.base import Task
from mil_cli.task.source import build_task
from mil_cli.training.config import TrainerConfig
from mil_cli.training.eager import EagerModule
from mil_cli.training.loop import fit

if TYPE_CHECKING:
    from mil_cli.recipe.schema import Recipe

SCORED_SAMPLES = 64
"""Of each of the batches that scores look at."""


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


@dataclass(frozen=True)
class Training:
    """What the training of an architecture gave.

    Attributes:
        epochs: Of each epoch ``train_loss`` and ``val``, where these are finite, and the seconds of ``training`` and
            ``validation``.
        quality: What the weights reach on `val`; None if the training collapsed.
        model: The trained architecture.
    """

    epochs: list[dict[str, Any]]
    quality: float | None
    model: Model | EagerModule


@dataclass(frozen=True)
class Workplace:
    """What the architectures of a recipe are assessed with.

    Attributes:
        space: What the recipe's model is.
        source: Where it comes from.
        data: Its data.
        task: Its task.
        example: Positional and keyword arguments of the model.
        progress: Where trainings are reported.
        description: What progress calls each.
    """

    space: DesignedSpace
    source: ModelSource
    data: Data
    task: Task
    example: tuple[tuple[Any, ...], dict[str, Any]]
    progress: Progress | None = None
    description: str = "training"

    @classmethod
    def of(cls, recipe: Recipe, progress: Progress | None = None, description: str = "training") -> Workplace:
        """Build all of it; the recipe's folder must be importable.

        Args:
            recipe: Its model is a space.
            progress: Where trainings are reported.
            description: What progress calls each.

        Raises:
            MilError: Data or model cannot be built, or the model holds no choice.
        """
        data, task = build_data(recipe.data, root=recipe.root), build_task(recipe.task, root=recipe.root)
        return cls(space_of(recipe), recipe.model, data, task, example_of(data, task), progress, description)

    def build(self, choices: Mapping[str, Chosen], *, seed: int) -> nn.Module:
        """Return an architecture with fresh weights."""
        return self.space.build(self.space.architecture(choices), seed=seed)

    def capture(self, module: nn.Module) -> Model:
        """Return the graph of an architecture."""
        return capture_module(self.source, module, example=self.example)

    def at_resolution(self, module: nn.Module, model: Model, share: float) -> EagerModule:
        """Return an architecture as it is trained on smaller images; a capture has taken their size as a constant.

        Args:
            module: The architecture, with its first weights.
            model: Its capture.
            share: Of the height and width of images.

        Raises:
            MilError: It does not take them, or the recipe's inputs are no images.
        """
        samples = self.check_resolution(module, share)
        return EagerModule(module, spec=model.spec, samples=samples)

    def check_resolution(self, module: nn.Module, share: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return example inputs with smaller images, after a run of an architecture and of the task's loss on them.

        Raises:
            DataError: No input is an image of floating-point numbers.
            ModelError: The architecture or the task does not take images of this size.
        """
        where = "rank.partial.resolution"
        batch = next(iter(Resized(self.data.train, share).batches(EXAMPLE_BATCH)))
        args, kwargs = self.task.inputs(batch)
        images = [value for value in (*args, *kwargs.values()) if is_image(value)]
        if not images:
            hint = "leave it out; to train on less, set rank.partial.samples"
            raise DataError(
                "no input is a batch of images, floating-point numbers (samples, channels, height, width)",
                where=where,
                value=share,
                hint=hint,
            )
        try:
            with torch.no_grad():
                self.task.loss(module.eval()(*args, **kwargs), batch)
        except (MilError, RuntimeError, ValueError, IndexError, TypeError) as problem:
            height, width = images[0].shape[2:]
            hint = (
                "give a larger share or leave it out; a model that pools at its end (nn.AdaptiveAvgPool2d(1)) takes any"
            )
            raise ModelError(
                f"the model cannot be trained on images of {height} x {width}: {str(problem).splitlines()[0]}",
                where=where,
                value=share,
                hint=hint,
            ) from problem
        return args, kwargs

    def scores(self, model: Model, names: Sequence[str], *, seed: int) -> dict[str, dict[str, float]]:
        """Return ``value``, ``wall_seconds`` and ``cpu_seconds`` of each score.

        Args:
            model: The architecture, with its first weights.
            names: Which scores.
            seed: Of the samples that are looked at.
        """
        batches = list(islice(self.data.train.batches(SCORED_SAMPLES, shuffle=True, seed=seed), 2))
        found = score(model, names, task=self.task, batches=batches, seed=seed)
        return {
            name: {"value": one.value, "wall_seconds": round(one.seconds, 6), "cpu_seconds": round(one.cpu_seconds, 6)}
            for name, one in found.items()
        }

    def train(
        self,
        model: Model | EagerModule,
        settings: TrainerConfig,
        *,
        seed: int,
        samples: int | None = None,
        resolution: float = 1.0,
    ) -> Training:
        """Train a copy of an architecture.

        Args:
            model: The architecture, with its first weights.
            settings: How; every epoch is evaluated.
            seed: Of the order and the augmentation.
            samples: Samples of each epoch; None: all.
            resolution: Share of the height and width of images, in training and evaluation.
        """
        train = self.data.train if samples is None else Shortened(self.data.train, samples)
        val = self.data.val
        if resolution < 1:
            train, val = Resized(train, resolution), Resized(val, resolution)
        timed_train, timed_val = _Timed(train, []), _Timed(val, [])
        timed = replace(self.data, train=timed_train, val=timed_val)
        result = fit(
            model,
            task=self.task,
            data=timed,
            settings=settings,
            seed=seed,
            progress=self.progress,
            description=self.description,
        )
        spans = _spans(timed_train.began, timed_val.began, Clocks.now())
        epochs: list[dict[str, Any]] = []
        for entry, (training, validation) in zip(result.history, spans, strict=True):
            figures = {key: value for key, value in entry.items() if key in ("train_loss", "val")}
            known = {key: value for key, value in figures.items() if math.isfinite(value)}
            epochs.append({**known, "training": training, "validation": validation})
        return Training(epochs, self._quality(epochs, settings), result.model)

    def _quality(self, epochs: Sequence[Mapping[str, Any]], settings: TrainerConfig) -> float | None:
        last: float | None = epochs[-1].get("val")
        if last is None or settings.early_stopping is None:
            return last
        best = max if self.task.higher_is_better else min
        return float(best(epoch["val"] for epoch in epochs if "val" in epoch))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that results do not depend on how many trainings run beside each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _spans(
    train: Sequence[Clocks], val: Sequence[Clocks], end: Clocks
) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """Yield the seconds of each epoch's training and validation; one that collapsed was not evaluated."""
    stops, ends = [*val, end][: len(train)], [*train[1:], end]
    for start, stop, last in zip(train, stops, ends, strict=True):
        yield start.until(stop), stop.until(last)
