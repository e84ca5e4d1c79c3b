"""What a ranking computes of each architecture, in processes beside each other; each result is kept as it comes."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mil_cli.assess.curves import Curve, early_stopped, extrapolate, sum_of_losses
from mil_cli.errors import MilError
from mil_cli.events import Progress
from mil_cli.files import sha256_of_file
from mil_cli.models.user_code import importable, user_code_fingerprint
from mil_cli.run import architectures
from mil_cli.run.architectures import Clocks, Training, Workplace, one_thread
from mil_cli.run.cache import Cache
from mil_cli.run.environment import computing_environment
from mil_cli.spaces.architecture import Architecture
from mil_cli.stages.surroundings import fingerprint_of
from mil_cli.training.config import TrainerConfig
from mil_cli.workers import workers

if TYPE_CHECKING:
    from torch import nn

    from mil_cli.graph.model import Model
    from mil_cli.recipe.schema import Recipe

Result = dict[str, Any]
"""What a part gave, and ``wall_seconds`` and ``cpu_seconds`` that it took."""

FEWEST_EPOCHS = 4
"""Epochs below which no curve can be continued."""


@dataclass(frozen=True)
class Part:
    """One thing that is computed of an architecture.

    Attributes:
        name: Of a score, or of a training.
        trainer: How it is trained; None: it is scored.
        samples: Samples of each epoch; None: all.
        foretells: Epochs of the whole training that a partial one is to foretell; None: it is no partial one.
        resolution: Share of their height and width that images have in it.
    """

    name: str
    trainer: TrainerConfig | None = None
    samples: int | None = None
    foretells: int | None = None
    resolution: float = 1.0

    def key(self) -> list[object]:
        """Return all that says what comes of it, JSON-able."""
        trainer = None if self.trainer is None else self.trainer.model_dump(mode="json")
        return [self.name, trainer, self.samples, self.foretells, self.resolution]


@dataclass(frozen=True)
class Job:
    """Parts of one architecture, for one process: they share the capture.

    Attributes:
        architecture: Its choices.
        parts: What is computed.
        seed: Of weights, order, augmentation, and the samples that scores look at.
    """

    architecture: Architecture
    parts: tuple[Part, ...]
    seed: int


def compute(
    recipe: Recipe, job: Job, *, progress: Progress | None = None, description: str = "training"
) -> list[Result]:
    """Return what each part of a job gave, on one thread.

    Args:
        recipe: Its model is the space.
        job: The job.
        progress: Where trainings are reported.
        description: What progress calls each.

    Raises:
        MilError: The architecture cannot be built, captured, scored or trained.
    """
    began = Clocks.now()
    try:
        with one_thread(), importable(recipe.root):
            return _results(Workplace.of(recipe, progress, description), job, began)
    except MilError as problem:
        named = f"architecture {job.architecture}"
        problem.where = named if problem.where is None else f"{problem.where}, of {named}"
        raise


def _results(place: Workplace, job: Job, began: Clocks) -> list[Result]:
    """Compute the parts; the first one's seconds are also those of data, module and capture."""
    module = place.build(job.architecture, seed=job.seed)
    model = place.capture(module)
    before = began.until(Clocks.now())
    names = [part.name for part in job.parts if part.trainer is None]
    scores = place.scores(model, names, seed=job.seed) if names else {}
    results = [
        scores[part.name] if part.trainer is None else _trained(place, module, model, part, part.trainer, seed=job.seed)
        for part in job.parts
    ]
    for clock, seconds in before.items():
        results[0][clock] += seconds
    return results


def _trained(
    place: Workplace, module: nn.Module, model: Model, part: Part, trainer: TrainerConfig, *, seed: int
) -> Result:
    began = Clocks.now()
    start = model if part.resolution == 1 else place.at_resolution(module, model, part.resolution)
    training = place.train(start, trainer, seed=seed, samples=part.samples, resolution=part.resolution)
    if part.foretells is None:
        found: Result = {"quality": training.quality}
    else:
        found = foretold(training, part.foretells, higher_is_better=place.task.higher_is_better)
    return {**found, **began.until(Clocks.now())}


def foretold(training: Training, epochs: int, *, higher_is_better: bool) -> Result:
    """Return what a partial training says, larger where an architecture is thought better; nothing if it collapsed."""
    if training.quality is None:
        return {}
    seen = training.epochs
    curve = Curve([one["train_loss"] for one in seen], [one["val"] for one in seen], higher_is_better)
    found = {"val": early_stopped(curve), "sum_of_losses": sum_of_losses(curve, last=len(seen))}
    if len(seen) >= FEWEST_EPOCHS:
        found["extrapolated"] = extrapolate(curve, max(epochs, len(seen))).score
    return found


@dataclass(frozen=True)
class Kept:
    """Results in the cache: of equal space, data, task, settings and code each is computed once.

    Attributes:
        cache: Where they are.
        origin: Fingerprint of what all of them rest on.
        fresh: Whether what is there is computed anew.
    """

    cache: Cache
    origin: str
    fresh: bool

    def find(self, job: Job, part: Part) -> Result | None:
        """Return what a part gave, or None if it is not known."""
        key = self._key(job, part)
        if self.fresh:
            self.cache.drop(key)
        entry = self.cache.find(key, lambda _: True)
        return None if entry is None else entry.facts

    def store(self, job: Job, part: Part, result: Result) -> None:
        """Keep what a part gave."""
        key, label = self._key(job, part), f"{part.name} of {job.architecture}"
        with self.cache.computing(key, label) as workspace:
            self.cache.store(key, workspace, kind="rank", label=label, trace={}, facts=result)

    def _key(self, job: Job, part: Part) -> str:
        return fingerprint_of([self.origin, job.architecture.to_json(), job.seed, part.key()])


def origin_of(recipe: Recipe, place: Workplace) -> str:
    """Return the fingerprint of all that results rest on, but for architecture, seed and part."""
    source = "".join(inspect.getsource(module) for module in (architectures, sys.modules[__name__]))
    return fingerprint_of(
        {
            "model": recipe.model.model_dump(mode="json"),
            "files": [sha256_of_file(path) for path in recipe.model.files(recipe.root)],
            "user_code": user_code_fingerprint(recipe.root),
            "data": [place.data.train.fingerprint(), place.data.val.fingerprint()],
            "task": place.task.fingerprint(),
            "environment": {**computing_environment(), "threads": 1},
            "code": hashlib.sha256(source.encode()).hexdigest(),
        }
    )


def compute_all(
    recipe: Recipe, jobs: Sequence[Job], *, processes: int, progress: Progress
) -> Iterator[tuple[Job, list[Result]]]:
    """Compute jobs, each on one thread, and give the results as they come.

    Args:
        recipe: Its model is the space.
        jobs: The jobs.
        processes: How many run at the same time; 1: in this process.
        progress: Where trainings in this process are reported.

    Raises:
        MilError: A job cannot be done, or a process was ended from outside.
    """
    if processes == 1 or len(jobs) < 2:
        for number, job in enumerate(jobs, 1):
            yield job, compute(recipe, job, progress=progress, description=f"training {number} of {len(jobs)}")
        return
    with workers(processes, threads=1, where="rank.jobs", ordered=False) as call_all:
        yield from call_all(_numbered, ((recipe, job) for job in jobs))


def _numbered(recipe: Recipe, job: Job) -> tuple[Job, list[Result]]:
    return job, compute(recipe, job)
