"""What a training minimises, and what it may look at: objectives, hooks, and the training under way as they see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias

import torch

from mil_cli.data.base import Batch
from mil_cli.training.trainee import T

Objective: TypeAlias = Callable[[Any, Batch], torch.Tensor]
"""(outputs, batch) -> the scalar to minimise."""


@dataclass(frozen=True)
class Running(Generic[T]):
    """A training under way, as what watches it sees it.

    Attributes:
        model: The model in training.
        steps: Tells the number of steps taken.
        total_steps: Steps of the whole training, if nothing ends it early.
        forward: ``(graph, *args, **kwargs)`` runs another graph over the same weights as the model itself is run: in
            the precision of the training.
        tapped: Gives the values that the model's last forward had at the module paths asked for.
        device: Where the model and its batches are.
        channels_last: Whether images are laid out so.
    """

    model: T
    steps: Callable[[], int]
    total_steps: int
    forward: Callable[..., Any]
    tapped: Callable[[], Mapping[str, torch.Tensor]]
    device: torch.device
    channels_last: bool


StepHook: TypeAlias = Callable[[T, int, int], None]
"""Called with the model in training, the number of steps taken, and that of the whole training."""

Binding: TypeAlias = Callable[[Running[T]], Objective]
"""Makes an objective that needs more than outputs and batch."""

Stop: TypeAlias = Callable[[Running[T]], str | None]
"""Gives a reason to end the training under way, if there is one."""
