"""All that a training under way consists of: written to its checkpoint now and then, and taken up again from there."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mil_cli.data.base import mix_seed
from mil_cli.training.checkpoint import CheckpointSlot
from mil_cli.training.ema import MovingAverage

_VERSION = 2
_EPOCH_SAVE_SECONDS = 2.0
_SAVE_SHARE = 50  # a checkpoint is written at most so often that writing takes 1/50 of the time


@dataclass
class Position:
    """How far training has come: everything that is not a tensor."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int = 0
    stale: int = 0
    stopped: str | None = None
    diverged: bool = False
    seconds: float = 0.0


@dataclass(kw_only=True)
class TrainingState:
    """A training under way.

    Attributes:
        fabric: Where it runs.
        seed: Of its random numbers.
        weights: The model's tensors by name, those that train; changed in place.
        companions: Modules that are trained along.
        optimizer: The optimizer, not as the fabric wraps it.
        scheduler: Of its learning rate.
        average: The average of the weights, if one is kept.
        loss_sum: Sum of the losses of this epoch's steps so far, a scalar; changed in place.
        best: The weights that were best on val, once there are any.
        position: How far it has come.
    """

    fabric: Fabric
    seed: int
    weights: Mapping[str, torch.Tensor]
    companions: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    average: MovingAverage | None
    loss_sum: torch.Tensor
    best: dict[str, torch.Tensor] | None = None
    position: Position = field(default_factory=Position)

    def copy_weights(self) -> dict[str, torch.Tensor]:
        """Return copies of the weights as they are."""
        return {name: tensor.detach().clone() for name, tensor in self.weights.items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give the weights other values."""
        for name, tensor in self.weights.items():
            tensor.detach().copy_(weights[name])

    def sign(self, facts: Sequence[Any]) -> str:
        """Return what tells this training, for which some facts hold, from others that might share its slot."""
        tensors = {**self.weights, **self.companions.state_dict(prefix="companions.")}
        shapes = {
            name: [str(tensor.dtype), list(tensor.shape)]
            for name, tensor in tensors.items()
            if isinstance(tensor, torch.Tensor)  # what else a companion keeps has no form that is known before
        }
        content = json.dumps([_VERSION, *facts, shapes], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes: tensors, not copied, and plain values."""
        on_gpu = self.fabric.device.type == "cuda"
        return {
            "position": {**vars(self.position)},
            "model": dict(self.weights),
            "companions": self.companions.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "best": self.best,
            "random": torch.get_rng_state(),
            "random_device": torch.cuda.get_rng_state(self.fabric.device) if on_gpu else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another process was, global random state included."""
        self.load_weights(state["model"])
        self.companions.load_state_dict(state["companions"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        vars(self.position).update(state["position"])
        self.loss_sum.fill_(self.position.loss_sum)
        self.best = state["best"]
        if self.fabric.global_rank == 0:
            torch.set_rng_state(state["random"])
            if self.fabric.device.type == "cuda" and state["random_device"] is not None:
                torch.cuda.set_rng_state(state["random_device"], self.fabric.device)
        else:
            torch.manual_seed(mix_seed(self.seed, self.fabric.global_rank, self.position.epoch, self.position.step))


class Checkpoints:
    """Keeps a training's state in a slot, often enough and without taking more than a small share of the time.

    It also counts the seconds that the training took, interruptions left out, into its position.

    Args:
        state: The training.
        slot: Where its state is kept.
        facts: What holds for this training, so that another one's state is not taken for its own.
        every: Seconds between two checkpoints inside an epoch; 0: after each step.
        clock: Seconds that only ever grow.
    """

    def __init__(
        self,
        state: TrainingState,
        slot: CheckpointSlot,
        *,
        facts: Sequence[Any],
        every: float,
        clock: Callable[[], float],
    ) -> None:
        self._state, self._slot, self._every, self._clock = state, slot, every, clock
        self._signature = state.sign(facts)
        self._saved_at = self._counted_at = clock()
        self._save_seconds = 0.0
        self._saved_steps: tuple[int, int] | None = None

    def resume(self) -> bool:
        """Go on from the slot's state; return False if it holds that of another training, which stays unread."""
        state = self._slot.load()
        if state is None:
            return True
        if state.get("signature") != self._signature:
            return False
        self._state.load_state_dict(state)
        self._saved_steps = self._steps()
        return True

    def after_step(self, now: float) -> None:
        """Save if it is time to, unless the losses are no numbers any more."""
        due = now - self._saved_at >= max(self._every, _SAVE_SHARE * self._save_seconds)
        if due and math.isfinite(self._state.loss_sum.item()):
            self._save()

    def after_epoch(self) -> None:
        """Save, where epochs are not short."""
        soon = min(self._every, _EPOCH_SAVE_SECONDS)
        if self._clock() - self._saved_at >= max(soon, _SAVE_SHARE * self._save_seconds):
            self._save()

    def finish(self) -> None:
        """Save what the last checkpoint lacks."""
        if self._saved_steps != self._steps():
            self._save()

    def count_seconds(self) -> None:
        """Bring the position's seconds up to now."""
        now = self._clock()
        self._state.position.seconds += now - self._counted_at
        self._counted_at = now

    def _steps(self) -> tuple[int, int]:
        return self._state.position.epoch, self._state.position.step

    def _save(self) -> None:
        started = self._clock()
        self._state.position.loss_sum = self._state.loss_sum.item()
        self.count_seconds()
        if self._state.fabric.global_rank == 0:
            self._slot.save({"signature": self._signature, **self._state.state_dict()})
        self._saved_steps, self._saved_at = self._steps(), self._clock()
        self._save_seconds = self._saved_at - started if self._every else 0.0
