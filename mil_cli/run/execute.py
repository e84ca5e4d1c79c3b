"""Runs one stage of a chain, or takes its result from the cache if nothing that it had read has changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mil_cli.errors import StageError
from mil_cli.events import Progress
from mil_cli.graph.model import Model
from mil_cli.run.cache import Cache, Entry, Workspace
from mil_cli.run.environment import code_fingerprint, computing_environment
from mil_cli.stages.context import Context
from mil_cli.stages.quantize.weights import settle_biases
from mil_cli.stages.registry import StageConfig, function_of
from mil_cli.stages.surroundings import StoredModel, Surroundings, fingerprint_of
from mil_cli.stages.trace import Trace


class CapturedModel:
    """A model in memory, with the fingerprint computed once."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.fingerprint = model.fingerprint()

    def load(self) -> Model:
        """Return the model."""
        return self._model


class CachedModel:
    """The model of a cache entry, loaded when first needed."""

    def __init__(self, entry: Entry) -> None:
        self._path = entry.folder / "model.pt2"
        self._model: Model | None = None
        self.fingerprint = str(entry.facts["fingerprint"])

    def load(self) -> Model:
        """Return the model, reading it on the first call."""
        if self._model is None:
            self._model = Model.load(self._path)
        return self._model


@dataclass(frozen=True)
class StageResult:
    """What one stage made.

    Attributes:
        name: The stage's key in the recipe.
        config: Its settings.
        model: The model it returned.
        folder: Where its files are kept in the cache.
        cached: Whether it was taken from the cache.
        facts: seconds, quality, macs, params and the stage's own notes.
    """

    name: str
    config: StageConfig
    model: StoredModel
    folder: Path
    cached: bool
    facts: dict[str, Any]


def stage_key(name: str, config: StageConfig, upstream: str) -> str:
    """Return the cache key of a stage: all that is known before it runs.

    Args:
        name: Its key in the recipe, which its seeds derive from.
        config: Its settings.
        upstream: Fingerprint of the model it is given.
    """
    return fingerprint_of(
        {
            "name": name,
            "method": [config.family, config.method, config.version],
            "settings": config.model_dump(mode="json"),
            "code": code_fingerprint(config),
            "upstream": upstream,
            "environment": computing_environment(),
        }
    )


@dataclass(frozen=True)
class Executor:
    """Runs stages, or takes their results from the cache.

    Attributes:
        surroundings: What the stages may read.
        cache: Where results are kept.
        fresh: Whether to compute even what is there.
        progress: Where work is reported.
        clock: Seconds, from any zero.
    """

    surroundings: Surroundings
    cache: Cache
    fresh: bool
    progress: Progress
    clock: Callable[[], float] = time.monotonic

    def run(self, name: str, config: StageConfig, upstream: StoredModel) -> StageResult:
        """Return the result of the stage `name` on the model `upstream`.

        Raises:
            MilError: Whatever the stage cannot do; nothing of a failed stage is stored but its checkpoints.
        """
        key = stage_key(name, config, upstream.fingerprint)
        if self.fresh:
            self.cache.drop(key)
        entry = self.cache.find(key, self._valid)
        if entry is not None:
            return _result(name, config, entry, cached=True)
        with self.cache.computing(key, name) as workspace:
            entry = self.cache.find(key, self._valid)
            if entry is not None:
                workspace.remove()
                return _result(name, config, entry, cached=True)
            return _result(name, config, self._compute(name, config, upstream, workspace, key), cached=False)

    def _valid(self, reads: dict[str, str]) -> bool:
        return Trace(reads).holds(self.surroundings)

    def _compute(self, name: str, config: StageConfig, upstream: StoredModel, workspace: Workspace, key: str) -> Entry:
        label = f"{name} ({config.key()})"
        remembered = workspace.remembered()
        spent, going_on = 0.0, None
        if remembered is None or self.fresh or not self._valid(remembered[0]):
            workspace.forget_checkpoints()
            self.progress.notice(label)
        else:
            going_on, spent = remembered
            self.progress.notice(f"{label}: going on from its last checkpoint")
        started = self.clock()
        context = Context(
            name=name,
            surroundings=self.surroundings,
            progress=self.progress,
            workspace=workspace.folder / "checkpoints",
            on_checkpoint=lambda trace: workspace.remember(trace.reads, spent + self.clock() - started),
        )
        if going_on is not None:
            context.trace.reads.update(going_on)  # read before the interruption, and the result rests on it
        try:
            model = function_of(config)(upstream.load(), config, context)
        except StageError as error:
            if error.where in type(config).model_fields:  # what reads a setting need not know the stage that has it
                error.where = f"stages.{name}.{error.where}"
            raise
        if config.family != "quantize":  # training moves the biases of a quantized model off what its kernels hold
            settle_biases(model.graph)
        seconds = spent + self.clock() - started
        path = workspace.result / "model.pt2"
        model.save(path)
        # What goes on from here is what a later run would read, so that a run with hits equals one without.
        stored = Model.load(path)
        facts = {
            "seconds": seconds,
            "fingerprint": stored.fingerprint(),
            "quality": asdict(context.evaluate(stored)),
            "macs": stored.macs(),
            "params": stored.num_params(),
            "notes": context.notes,
        }
        return self.cache.store(key, workspace, kind="stage", label=label, trace=context.trace.reads, facts=facts)


def _result(name: str, config: StageConfig, entry: Entry, *, cached: bool) -> StageResult:
    return StageResult(name, config, CachedModel(entry), entry.folder, cached, entry.facts)
