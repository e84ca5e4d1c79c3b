"""How a stage reaches anything outside its model and its settings, and the record of what it read.

A result is reused only if everything that its stage had read still has the same fingerprint. So a stage gets nothing
but through its `Context`, which writes down every read by name in a `Trace`; `Surroundings` gives the fingerprint of
any name.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mil_cli.data.base import batch_length, repeated
from mil_cli.errors import DataError, ModelError, RecipeError, StageError, did_you_mean
from mil_cli.events import Progress
from mil_cli.measure.latency import measure_latency
from mil_cli.stages.registry import StageConfig, config_type, function_of
from mil_cli.stages.surroundings import Surroundings, derive_seed
from mil_cli.stages.trace import ReadData, ReadDevice, Trace, TracedSlot
from mil_cli.training.checkpoint import CheckpointSlot, FileSlot, NullSlot
from mil_cli.training.config import TrainerConfig, merged_settings
from mil_cli.training.evaluate import Quality, evaluate, fixed_batch
from mil_cli.training.loop import FitResult, fit
from mil_cli.training.objective import Binding, StepHook, Stop
from mil_cli.training.trainee import T

if TYPE_CHECKING:
    from torch import nn

    from mil_cli.data.base import Batch, Data, Split
    from mil_cli.device.profile import DeviceProfile
    from mil_cli.graph.model import Model
    from mil_cli.measure.process import Feeds
    from mil_cli.measure.types import Latency
    from mil_cli.spaces import DesignedSpace
    from mil_cli.task.base import Task


class Context:
    """What one stage is handed beside its model and its settings.

    Args:
        name: The stage's key in the recipe.
        surroundings: What it may read.
        progress: Where it reports.
        workspace: The folder for its checkpoints; None keeps none.
        on_checkpoint: Called with the trace before each checkpoint is written.
    """

    def __init__(
        self,
        *,
        name: str,
        surroundings: Surroundings,
        progress: Progress,
        workspace: Path | None = None,
        on_checkpoint: Callable[[Trace], None] | None = None,
    ) -> None:
        self.name = name
        self.progress = progress
        self.trace = Trace()
        self.notes: dict[str, object] = {}
        self._surroundings = surroundings
        self._workspace = workspace
        self._on_checkpoint = on_checkpoint
        self._prefix = ""
        self._before_step: StepHook | None = None
        self._steps: int | None = None
        self._told_repeated = False

    def _record(self, read: str) -> None:
        if read not in self.trace.reads:
            self.trace.reads[read] = self._surroundings.fingerprint(read)

    @property
    def task(self) -> Task:
        """What the model is for."""
        self._record("task")
        return self._surroundings.task

    @property
    def data(self) -> Data:
        """The `train` and `val` splits; reading `test` raises."""
        return cast("Data", ReadData(self._surroundings.data, self._record))

    def with_train(self, train: Split, *, made: bool = False) -> Data:
        """Return the splits as `data` gives them, but with another one to train on; that of the recipe is not read.

        Args:
            train: The split; its fingerprint must follow from what was read.
            made: Whether the stage makes its samples itself, so that a dry run has yet to shorten it.
        """
        train = self._surroundings.shorten(train) if made else train
        return cast("Data", ReadData(self._surroundings.data, self._record, train))

    def other_data(self, settings: object) -> Data:
        """Return data other than the recipe's, of which a stage may read `train`.

        Args:
            settings: As in the recipe's section ``data``: ``_target_`` and its arguments.

        Raises:
            DataError: What is missing, empty or malformed, under the key ``data`` of this stage.
        """
        try:
            self._record(f"other_data/{json.dumps(settings, sort_keys=True)}")
            return self._surroundings.load_data(settings)
        except DataError as problem:
            problem.where = f"stages.{self.name}.{problem.where or 'data'}"
            raise

    @property
    def device(self) -> DeviceProfile:
        """The target's profile; each field counts as read when it is read."""
        return cast("DeviceProfile", ReadDevice(self._surroundings.device, self._record))

    @property
    def seed(self) -> int:
        """A seed that belongs to this stage."""
        self._record("seed")
        return derive_seed(self._surroundings.seed, self.name)

    def space(self) -> DesignedSpace:
        """Return the space that the recipe's own model is, with its first weights; a new one each time.

        Raises:
            StageError: The model holds no choice.
        """
        self._record("space")
        try:
            return self._surroundings.load_space()
        except ModelError as problem:
            raise StageError(
                f"stage '{self.name}' searches a space that the model holds, and {problem.what}",
                where="model",
                **({"value": problem.value} if problem.has_value else {}),
                hint="write choices into the model (mil_cli.spaces), or search inside it as it is by nas/elastic",
            ) from None

    def capture(self, module: nn.Module) -> Model:
        """Return a module of the recipe's space as a model, in evaluation mode, captured as the recipe's own is.

        Raises:
            CaptureError: It cannot be captured.
        """
        self._record("space")
        return self._surroundings.capture(module)

    @property
    def original(self) -> Model:
        """The uncompressed model; not to be changed.

        Raises:
            StageError: The stage is the one that makes it.
        """
        self._record("original")
        if self._surroundings.original is None:
            raise StageError("the uncompressed model does not exist yet while it is trained", where=self.name)
        return self._surroundings.original.load()

    def trainer(self, overrides: Mapping[str, Any] | None = None) -> TrainerConfig:
        """Return the recipe's trainer settings with `overrides` merged over them.

        Raises:
            RecipeError: The overrides are no trainer settings.
        """
        self._record("trainer")
        return merge_trainer(self._surroundings.trainer, overrides or {}, where=f"stages.{self.name}.trainer")

    def goal(self, name: str) -> object:
        """Return the bound of a goal, or None."""
        self._record(f"goal/{name}")
        return self._surroundings.goals.get(name)

    def generator(self, purpose: str = "") -> torch.Generator:
        """Return a random generator that belongs to this stage and purpose."""
        self._record("seed")
        return torch.Generator().manual_seed(derive_seed(self._surroundings.seed, self.name, purpose))

    def slot(self, name: str = "main") -> CheckpointSlot:
        """Return the place where a loop of this stage keeps its checkpoint; `name` tells loops apart."""
        if self._workspace is None:
            return NullSlot()
        return TracedSlot(FileSlot(self._workspace / f"{self._prefix}{name}.ckpt"), self._store_trace)

    def _store_trace(self) -> None:
        if self._on_checkpoint is not None:
            self._on_checkpoint(self.trace)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Give an empty folder for files that may be lost at any time; it is removed at the end of the block."""
        if self._workspace is None:
            with tempfile.TemporaryDirectory(prefix="mil-") as temporary:
                yield Path(temporary)
            return
        folder = self._workspace / f"{self._prefix}{name}.scratch"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def train(
        self,
        model: T,
        *,
        settings: TrainerConfig,
        doing: str,
        slot: str = "fit",
        bind: Binding[T] | None = None,
        taps: Sequence[str] = (),
        companions: nn.Module | None = None,
        stop: Stop[T] | None = None,
        data: Data | None = None,
    ) -> FitResult[T]:
        """Train a copy of `model` by the one training loop, resumably.

        Args:
            model: Where to start.
            settings: The trainer's settings, from `trainer`.
            doing: What progress calls it, such as ``training``.
            slot: Where its checkpoint is kept.
            bind: Makes the objective from the training under way; None: the task's loss.
            taps: Module paths whose values a bound objective reads; see `mil_cli.training.loop.fit`.
            companions: Modules that are trained along and dropped; see there.
            stop: Asked after each epoch; see there.
            data: The splits, where `train` is not that of the recipe; its fingerprint must follow from what was read.

        Returns:
            The trained model, in evaluation mode, with its history.
        """
        return fit(
            model,
            task=self.task,
            data=self.data if data is None else data,
            settings=settings,
            seed=self.seed,
            bind=bind,
            before_step=cast("StepHook[T] | None", self._before_step),
            taps=taps,
            companions=companions,
            stop=stop,
            steps=self._steps,
            checkpoint=self.slot(slot),
            progress=self.progress,
            description=f"{self.name}: {doing}",
        )

    def fit(self, model: T, *, settings: TrainerConfig, doing: str, **options: Any) -> T:
        """Train as `train` does, with its `options`, and note the history for the report; return the model."""
        result = self.train(model, settings=settings, doing=doing, **options)
        self.note(history=result.history, stopped=result.stopped)
        return result.model

    def finetune(
        self,
        model: Model,
        *,
        stage: str | None,
        name: str,
        trainer: Mapping[str, Any] | None = None,
        before_step: StepHook | None = None,
        steps: int | None = None,
    ) -> Model:
        """Train `model` by another stage of the recipe, or plainly on the task.

        Args:
            model: The model to train; it is not changed.
            stage: Key of a train or distill stage of the recipe; None trains on the task's loss.
            name: Tells this call from others of the same stage, so that each has its own checkpoint.
            trainer: Overrides merged over that stage's own trainer settings.
            before_step: Called before each step of the optimizer: may change gradients; see `fit`.
            steps: Train for so many steps, without evaluations, whatever number of epochs is set; see `fit`.

        Raises:
            StageError: There is no such stage, or it does not train.
        """
        config = config_type("train", "supervised")() if stage is None else self.settings_of(stage)
        if config.family not in ("train", "distill"):
            hint = "name a stage of the family train or distill"
            raise StageError(f"stage '{stage}' does not train", where=f"stages.{self.name}", hint=hint)
        config = config.for_finetuning()
        merged = merged_settings(getattr(config, "trainer", {}), trainer or {})
        config = config.model_copy(update={"trainer": merged})
        outer = self._before_step, self._steps
        self._before_step, self._steps = before_step, steps
        try:
            return self.run(model, config, name=name)
        finally:
            self._before_step, self._steps = outer

    def run_stage(self, model: Model, *, stage: str, name: str, settings: Mapping[str, Any]) -> Model:
        """Run another stage of the recipe on `model` with some other settings.

        Args:
            model: What it is given.
            stage: Its key.
            name: Tells this call from others of the same stage, so that each has its own checkpoints.
            settings: Merged over the stage's own.

        Raises:
            StageError: There is no such stage, or the settings do not fit it.
        """
        from pydantic import ValidationError

        config = self.settings_of(stage)
        try:
            config = type(config).model_validate({**config.model_dump(), **settings})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([f"stages.{stage}", *map(str, first["loc"])])
            raise StageError(first["msg"], where=where, value=first.get("input")) from None
        return self.run(model, config, name=name)

    def settings_of(self, stage: str) -> StageConfig:
        """Return the settings of another stage of the recipe.

        Raises:
            StageError: There is no such stage.
        """
        if stage not in self._surroundings.stages:
            hint = did_you_mean(stage, self._surroundings.stages)
            raise StageError(f"there is no stage '{stage}'", where=f"stages.{self.name}", hint=hint)
        self._record(f"stage/{stage}")
        return self._surroundings.stages[stage]

    def run(self, model: Model, config: StageConfig, *, name: str) -> Model:
        """Run a stage of some settings on `model` as part of this one.

        Args:
            model: What it is given.
            config: Its settings.
            name: Tells this call from others, so that each has its own checkpoints.
        """
        outer = self._prefix
        self._prefix = f"{outer}{name}-"
        try:
            return function_of(config)(model, config, self)
        finally:
            self._prefix = outer

    def evaluate(self, model: Callable[..., Any], *, limit: int | None = None) -> Quality:
        """Return the quality of `model` on `limit` samples of `val`, always the same ones; all by default."""
        return evaluate(model, task=self.task, split=self.data.val, split_name="val", limit=limit)

    def calibration(
        self, *, samples: int, batch_size: int, model: Model | None = None
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Yield (args, kwargs) of about `samples` training samples; see `calibration_batches`."""
        task = self.task
        for batch in self.calibration_batches(samples=samples, batch_size=batch_size, model=model):
            yield task.inputs(batch)

    def calibration_batches(self, *, samples: int, batch_size: int, model: Model | None = None) -> Iterator[Batch]:
        """Yield whole batches of about `samples` training samples, drawn by the seed, without augmentation.

        Args:
            samples: How many, about.
            batch_size: How many at once.
            model: Who takes them. Where its batch is fixed, batches have that size; if there are fewer training samples
                than that, some are repeated to fill the one batch.
        """
        self._record("seed")
        seed = derive_seed(self._surroundings.seed, "calibration")
        fixed = None if model is None else fixed_batch(model)
        size = fixed or batch_size
        seen = 0
        train = self.data.train
        # A short last batch would weigh as much as a full one, and has no variance if it is of one sample.
        for batch in train.batches(size, shuffle=True, seed=seed, drop_last=len(train) >= size):
            if fixed is not None and batch_length(batch) < fixed:
                self._tell_repeated(fixed, batch_length(batch))
                batch = repeated(batch, fixed)
            yield batch
            seen += size
            if seen >= samples:
                return

    def _tell_repeated(self, fixed: int, samples: int) -> None:
        if not self._told_repeated:
            known = f"batches of {fixed} only, and train has {samples} samples"
            self.progress.notice(f"{self.name}: the model takes {known}: some count more than once")
        self._told_repeated = True

    def latencies(self, files: Sequence[Path], *, feeds: Feeds) -> list[Latency]:
        """Time models side by side on the device, by the protocol of all latencies; its version counts as read.

        Args:
            files: ONNX files that take the same inputs; the first is what the others are compared with.
            feeds: Input name -> array of one sample.

        Raises:
            MeasureError: The runtime failed on a file.
        """
        self._record("latency_protocol")
        return measure_latency(files, device=self.device, feeds=feeds, progress=self.progress)

    def source(self, source: object) -> Model:
        """Return another model, a teacher say, from a `.pt2` path or a model source's settings."""
        self._record(f"source/{json.dumps(source, sort_keys=True)}")
        return self._surroundings.load_source(source)

    def note(self, **facts: object) -> None:
        """Keep JSON-able facts that the report shows for this stage."""
        self.notes.update(facts)


def merge_trainer(settings: TrainerConfig, overrides: Mapping[str, Any], *, where: str) -> TrainerConfig:
    """Return `settings` with `overrides` over them, validated.

    Raises:
        RecipeError: An override is unknown or out of range; `where` and its key are named.
    """
    if not overrides:
        return settings
    from pydantic import ValidationError

    try:
        return TrainerConfig.model_validate(settings.merged(overrides))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([where, *(str(part) for part in first["loc"])])
        hint = did_you_mean(str(first["loc"][0]), TrainerConfig.model_fields)
        raise RecipeError(first["msg"], where=key, value=first.get("input"), hint=hint) from None
