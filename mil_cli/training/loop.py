"""The one training loop: every stage that changes weights by gradients runs it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, cast

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mil_cli.data.base import Batch, Data, batch_count, batch_length, mix_seed
from mil_cli.errors import RecipeError
from mil_cli.events import Bar, Progress, SilentProgress
from mil_cli.graph.model import Model
from mil_cli.graph.taps import tap
from mil_cli.task.base import Task
from mil_cli.training.checkpoint import CheckpointSlot, NullSlot
from mil_cli.training.config import TrainerConfig
from mil_cli.training.devices import Network, build_fabric, run_in_precision
from mil_cli.training.ema import MovingAverage
from mil_cli.training.evaluate import NotFiniteError, Quality, evaluate, too_few_samples
from mil_cli.training.layout import place, to_contiguous, use_channels_last
from mil_cli.training.objective import Binding, Objective, Running, StepHook, Stop
from mil_cli.training.optimizers import build_optimizer, build_scheduler
from mil_cli.training.state import Checkpoints, TrainingState
from mil_cli.training.trainee import T

_GUARD_STEPS = 100
_SHOW_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class FitResult(Generic[T]):
    """What training gave.

    Attributes:
        model: The trained model, in evaluation mode.
        history: For each epoch: ``epoch`` (from 1), ``steps`` taken until its end, ``train_loss``, ``learning_rate``,
            and ``val`` where it was evaluated.
        stopped: Why training stopped before its last epoch, or None.
        seconds: How long the steps and evaluations took, those before an interruption included.
    """

    model: T
    history: list[dict[str, Any]]
    stopped: str | None
    seconds: float


def fit(
    model: T,
    *,
    task: Task,
    data: Data,
    settings: TrainerConfig,
    seed: int,
    objective: Objective | None = None,
    bind: Binding[T] | None = None,
    before_step: StepHook[T] | None = None,
    taps: Sequence[str] = (),
    companions: nn.Module | None = None,
    steps: int | None = None,
    stop: Stop[T] | None = None,
    checkpoint: CheckpointSlot | None = None,
    progress: Progress | None = None,
    description: str = "training",
    clock: Callable[[], float] = time.monotonic,
) -> FitResult[T]:
    """Train a copy of a model.

    The same model, data, settings and seed give the same weights to the bit on the same machine with as many threads,
    also when the process was killed in between and the same call went on from the slot's checkpoint. The global random
    state is left as it was.

    Args:
        model: Where to start; not changed.
        task: Gives inputs, loss and metric.
        data: `train` changes weights; `val` is evaluated at the end of epochs.
        settings: How to train.
        seed: Of order, augmentation and dropout.
        objective: What to minimise; None: the task's loss.
        bind: Makes the objective from the training under way, in place of `objective`; what the objective draws must
            follow from the number of steps, so that a resumed training draws the same.
        before_step: Called after each backward pass and clipping, before the optimizer's step: may change gradients. It
            must keep nothing from step to step, so that a resumed training goes on alike.
        taps: Module paths whose outputs a bound objective reads by `Running.tapped`, of the same forward.
        companions: Modules that the objective runs and that are trained along, such as adapters; changed in place, kept
            in checkpoints, no part of the result. Parameters that need no gradient are left to whoever changes them.
        steps: Train for so many steps, whatever the settings' `epochs`, and do not evaluate; passes over more than an
            epoch are of equal length, so that there may be a few more. None: as the settings say.
        stop: Asked once after each epoch; a reason ends the training. It must follow from the steps taken, from the
            model and from `companions`, so that a resumed training is told the same.
        checkpoint: Where to keep checkpoints; the last one stays there, so that a finished training is not repeated.
        progress: Where to report.
        description: What progress calls this training.
        clock: Seconds that only ever grow.

    Returns:
        The model with the last weights (their average where `ema` is set); with the best on val where
        `early_stopping` is set or training diverged.

    Raises:
        MilError: Settings that do not fit, or a task that does not fit the model.
    """
    fabric = build_fabric(settings)
    devices = [fabric.device.index] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(mix_seed(seed, fabric.global_rank))
        loop = _Loop(
            model=model,
            task=task,
            data=data,
            settings=settings,
            seed=seed,
            bind=bind if bind is not None else lambda running: objective if objective is not None else task.loss,
            before_step=before_step,
            taps=taps,
            companions=companions if companions is not None else nn.Module(),
            steps=steps,
            stop=stop,
            slot=checkpoint if checkpoint is not None else NullSlot(),
            progress=progress if progress is not None else SilentProgress(),
            description=description,
            clock=clock,
            fabric=fabric,
        )
        return loop.run()


class _Loop(Generic[T]):
    def __init__(
        self,
        *,
        model: T,
        task: Task,
        data: Data,
        settings: TrainerConfig,
        seed: int,
        bind: Binding[T],
        before_step: StepHook[T] | None,
        taps: Sequence[str],
        companions: nn.Module,
        steps: int | None,
        stop: Stop[T] | None,
        slot: CheckpointSlot,
        progress: Progress,
        description: str,
        clock: Callable[[], float],
        fabric: Fabric,
    ) -> None:
        self._task, self._data, self._settings, self._seed = task, data, settings, seed
        self._before_step, self._stop = before_step, stop
        self._progress, self._description, self._clock = progress, description, clock
        self._fabric = fabric
        self._model = model.clone().train()
        self._channels_last = use_channels_last(self._model, wanted=settings.channels_last)
        self._batch_size = self._choose_batch_size()
        self._drop_last = len(data.train) >= self._batch_size
        self._steps = batch_count(len(data.train), self._batch_size, drop_last=self._drop_last)
        self._evaluates = steps is None
        if steps is not None:
            epochs = -(-steps // self._steps)
            self._settings = settings = settings.model_copy(update={"epochs": epochs, "early_stopping": None})
            self._steps = -(-steps // epochs)
        self._companions = companions.train().to(fabric.device)
        trained = [*self._model.named_parameters(), *companions.named_parameters(prefix="companions")]
        optimizer = build_optimizer(settings, trained)
        self._scheduler: LRScheduler
        self._scheduler, self._interval = build_scheduler(
            settings, optimizer, total_steps=settings.epochs * self._steps
        )
        self._raw_optimizer: Optimizer = optimizer
        # The graph with taps shares its weights, so they go to the device before it is made.
        self._model.graph.to(fabric.device)
        self._tapped: Mapping[str, torch.Tensor] = {}
        self._taps = bool(taps)
        graph = tap(cast("Model", self._model), taps).graph() if taps else self._model.graph
        self._network, self._optimizer = fabric.setup(Network(graph), optimizer)
        # On one device in full precision Fabric's wrappers do nothing but cost time, which small models feel.
        self._plain = fabric.world_size == 1 and settings.precision == "32-true"
        self._forward: Callable[..., Any] = graph if self._plain else self._network
        weights = self._model.state_dict()
        self._average = MovingAverage(weights, settings.ema) if settings.ema is not None else None
        self._state = TrainingState(
            fabric=fabric,
            weights=weights,
            companions=self._companions,
            optimizer=optimizer,
            scheduler=self._scheduler,
            average=self._average,
            loss_sum=torch.zeros((), dtype=torch.float64, device=fabric.device),
            seed=seed,
        )
        self._position, self._loss_sum = self._state.position, self._state.loss_sum
        facts = [settings.model_dump(mode="json"), seed, self._steps]
        self._checkpoints = Checkpoints(
            self._state, slot, facts=facts, every=settings.checkpoint_every_seconds, clock=clock
        )
        self._initial = self._state.copy_weights()
        self._running = Running(
            model=self._model,
            steps=self._steps_so_far,
            total_steps=settings.epochs * self._steps,
            forward=partial(run_in_precision, fabric),
            tapped=lambda: self._tapped,
            device=fabric.device,
            channels_last=self._channels_last,
        )
        self._objective = bind(self._running)

    def run(self) -> FitResult[T]:
        if not self._checkpoints.resume():
            self._progress.notice(f"{self._description}: a checkpoint of other settings is ignored")
        total = self._settings.epochs * self._steps
        position = self._position
        with self._progress.work(self._description, total, done=self._steps_so_far()) as bar:
            while position.epoch < self._settings.epochs and position.stopped is None:
                self._run_epoch(bar)
        self._checkpoints.finish()
        return self._finish()

    def _steps_so_far(self) -> int:
        return self._position.epoch * self._steps + self._position.step

    def _run_epoch(self, bar: Bar) -> None:
        position = self._position
        clock, guard = self._clock, _GUARD_STEPS
        shown_at, unshown = clock(), 0
        batches = self._data.train.batches(
            self._batch_size,
            shuffle=True,
            augment=True,
            seed=self._seed,
            epoch=position.epoch,
            drop_last=self._drop_last,
            skip=position.step,
            shard=(self._fabric.global_rank, self._fabric.world_size),
        )
        for batch in batches:
            self._check_full(batch)
            self._step(place(batch, device=self._fabric.device, channels_last=self._channels_last))
            position.step += 1
            unshown += 1
            if position.step == self._steps:
                break
            if position.step % guard == 0 and not math.isfinite(self._loss_sum.item()):
                break
            now = clock()
            if now - shown_at >= _SHOW_SECONDS:
                bar.advance(unshown, note=self._note())
                shown_at, unshown = now, 0
            self._checkpoints.after_step(now)
        self._end_epoch()
        bar.advance(unshown, note=self._note())
        self._checkpoints.after_epoch()

    def _step(self, batch: Batch) -> None:
        args, kwargs = self._task.inputs(batch)
        outputs = self._forward(*args, **kwargs)
        if self._taps:
            outputs, self._tapped = outputs
        loss = self._objective(outputs, batch)
        optimizer = self._raw_optimizer if self._plain else self._optimizer
        if self._plain:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._fabric.backward(loss)
            self._share_gradients()
        if self._settings.gradient_clip is not None:
            self._fabric.clip_gradients(self._network, self._optimizer, max_norm=self._settings.gradient_clip)
        elif self._before_step is not None:
            self._fabric.strategy.precision.unscale_gradients(self._raw_optimizer)
        if self._before_step is not None:
            self._before_step(self._model, self._steps_so_far(), self._settings.epochs * self._steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self._interval == "step":
            self._scheduler.step()
        if self._average is not None:
            self._average.update()
        self._loss_sum += loss.detach()

    def _end_epoch(self) -> None:
        position, settings = self._position, self._settings
        total = self._fabric.all_reduce(self._loss_sum, reduce_op="mean")
        mean = float(torch.as_tensor(total)) / max(position.step, 1)
        entry: dict[str, Any] = {
            "epoch": position.epoch + 1,
            "steps": self._steps_so_far(),
            "train_loss": mean,
            "learning_rate": self._raw_optimizer.param_groups[0]["lr"],
        }
        position.history.append(entry)
        if self._interval == "epoch":
            self._scheduler.step()
        first = position.history[0]["train_loss"]
        if not math.isfinite(mean):
            self._diverge(f"the loss became {mean} in epoch {position.epoch + 1}")
        elif settings.divergence is not None and mean > settings.divergence * abs(first) and position.epoch > 0:
            self._diverge(f"the loss grew from {first:.4g} to {mean:.4g} by epoch {position.epoch + 1}")
        elif self._evaluates and (
            (position.epoch + 1) % settings.evaluate_every == 0 or position.epoch + 1 == settings.epochs
        ):
            self._evaluate(entry)
        reason = self._stop(self._running) if self._stop is not None else None
        if position.stopped is None:
            position.stopped = reason
        position.epoch += 1
        position.step = 0
        self._loss_sum.zero_()

    def _evaluate(self, entry: dict[str, Any]) -> None:
        position, patience = self._position, self._settings.early_stopping
        self._share_buffers()
        with self._averaged():
            try:
                quality = self._quality()
            except NotFiniteError:
                self._diverge(f"the outputs on val are not finite after epoch {position.epoch + 1}")
                return
            entry["val"] = quality.value
            best = None if position.best is None else Quality(**{**vars(quality), "value": position.best})
            if quality.better_than(best):
                position.best, position.best_epoch, position.stale = quality.value, position.epoch + 1, 0
                self._state.best = self._state.copy_weights()
                return
        position.stale += 1
        if patience is not None and position.stale >= patience and position.epoch + 1 < self._settings.epochs:
            position.stopped = (
                f"no better {quality.metric} on val in {patience} evaluations; the best was after epoch"
                f" {position.best_epoch}"
            )
            self._progress.notice(f"{self._description} stopped early: {position.stopped}")

    def _quality(self) -> Quality:
        device, channels_last = self._fabric.device, self._channels_last

        def predict(*args: Any, **kwargs: Any) -> Any:
            placed = place(args, device=device, channels_last=channels_last)
            named = place(kwargs, device=device, channels_last=channels_last)
            outputs = self._model(*placed, **dict(named))
            return _to_cpu(outputs) if device.type != "cpu" else outputs

        self._model.eval()
        try:
            return evaluate(predict, task=self._task, split=self._data.val, split_name="val", spec=self._model.spec)
        finally:
            self._model.train()

    def _diverge(self, reason: str) -> None:
        position = self._position
        position.diverged = True
        kept = f"those after epoch {position.best_epoch}" if self._state.best is not None else "those it started from"
        position.stopped = f"{reason}; the best weights are kept, {kept}"
        self._progress.notice(
            f"{self._description} diverged: {position.stopped}. Try a lower trainer.learning_rate, or"
            " trainer.gradient_clip: 1.0"
        )

    def _finish(self) -> FitResult[T]:
        position = self._position
        if position.diverged and self._state.best is None:
            self._state.load_weights(self._initial)
        elif (position.diverged or self._settings.early_stopping is not None) and self._state.best is not None:
            self._state.load_weights(self._state.best)
        elif self._average is not None:
            self._state.load_weights(self._average.tensors())
        self._share_buffers()
        # What an objective holds, teachers on the GPU say, would stay until the cycle of both were collected.
        del self._objective, self._running
        self._tapped = {}
        model = self._model
        for parameter in model.parameters():
            parameter.grad = None
        model.graph.to("cpu")
        to_contiguous(model)
        model.eval()
        if self._fabric.world_size > 1:
            model = model.clone()  # without the hooks of the distributed wrapper
        self._checkpoints.count_seconds()
        return FitResult(model=model, history=position.history, stopped=position.stopped, seconds=position.seconds)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the averaged weights in, for as long as the context is open."""
        if self._average is None:
            yield
            return
        live = self._state.copy_weights()
        self._state.load_weights(self._average.tensors())
        try:
            yield
        finally:
            self._state.load_weights(live)

    def _share_gradients(self) -> None:
        """Average the companions' gradients over the processes, which the wrapper around the model does not see."""
        if self._fabric.world_size == 1:
            return
        for parameter in self._companions.parameters():
            if parameter.grad is not None:
                parameter.grad = torch.as_tensor(self._fabric.all_reduce(parameter.grad, reduce_op="mean"))

    def _share_buffers(self) -> None:
        """Give every process the first one's buffers (batch-norm statistics), so that all decide alike."""
        if self._fabric.world_size == 1:
            return
        for buffer in self._model.graph.buffers():
            torch.distributed.broadcast(buffer, src=0)

    def _choose_batch_size(self) -> int:
        size = self._settings.batch_size
        fixed = self._model.spec.fixed_batch
        if fixed is not None and fixed != size:
            self._progress.notice(f"the model takes batches of {fixed} only: training uses that instead of {size}")
            size = fixed
        if size % self._fabric.world_size:
            raise RecipeError(
                f"must divide by the number of processes, {self._fabric.world_size}",
                where="trainer.batch_size",
                value=size,
            )
        return size

    def _check_full(self, batch: Batch) -> None:
        """Refuse a batch that is too short for a model which takes one size only.

        Raises:
            DataError: It is; there are no more samples.
        """
        wanted = self._batch_size // self._fabric.world_size
        if not self._drop_last and batch_length(batch) < wanted and self._model.spec.fixed_batch is not None:
            raise too_few_samples(self._batch_size, "train", len(self._data.train))

    def _note(self) -> str:
        position = self._position
        parts = [f"epoch {min(position.epoch + 1, self._settings.epochs)}/{self._settings.epochs}"]
        if position.step:
            parts.append(f"loss {self._loss_sum.item() / position.step:.4g}")
        elif position.history:
            parts.append(f"loss {position.history[-1]['train_loss']:.4g}")
        if position.best is not None:
            parts.append(f"best {self._task.metric_name} {position.best:.4g}")
        return ", ".join(parts)


def _to_cpu(outputs: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), outputs)
