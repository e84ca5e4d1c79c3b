"""Optimizers and learning-rate schedules from their settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from mil_cli.errors import RecipeError
from mil_cli.models.user_code import call_target
from mil_cli.training.config import TrainerConfig

_ONECYCLE_START = 1 / 25
_WARMUP = {"onecycle": 0.25, "cosine": 0.0, "exponential": 0.0, "constant": 0.0}
_FINAL = {"onecycle": 1e-4, "cosine": 0.0, "exponential": 0.05, "constant": 1.0}
_EXPONENTIAL_END = 0.01
"""What a factor that falls exponentially would come to at the end, if it did not stay at its `final` before."""


def build_optimizer(settings: TrainerConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    """Build the optimizer; parameters with fewer than two dimensions get no weight decay.

    Args:
        settings: The trainer's settings.
        parameters: Names and parameters; those that need no gradient are left out.

    Raises:
        RecipeError: The settings make no optimizer.
    """
    trained = [parameter for _, parameter in parameters if parameter.requires_grad]
    if not trained:
        raise RecipeError("the model has no parameters to train", where="trainer")
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    config = dict(settings.optimizer)
    if settings.learning_rate is not None:
        config["lr"] = settings.learning_rate
    factory = call_target({**config, "_partial_": True}, root=None, where="trainer.optimizer", error=RecipeError)
    try:
        optimizer = factory([group for group in groups if group["params"]])
    except (TypeError, ValueError) as problem:
        raise RecipeError(
            f"the optimizer cannot be built: {problem}", where="trainer.optimizer", value=settings.optimizer
        ) from problem
    if not isinstance(optimizer, Optimizer):
        raise RecipeError(
            "the target must give a torch.optim.Optimizer",
            where="trainer.optimizer._target_",
            value=settings.optimizer["_target_"],
        )
    return optimizer


def build_scheduler(settings: TrainerConfig, optimizer: Optimizer, *, total_steps: int) -> tuple[LRScheduler, str]:
    """Build the schedule.

    Args:
        settings: The trainer's settings.
        optimizer: What it steers.
        total_steps: Steps of the whole training.

    Returns:
        The schedule, and whether it advances each ``step`` or each ``epoch``.

    Raises:
        RecipeError: The settings make no schedule.
    """
    config = dict(settings.scheduler)
    if "_target_" not in config:
        return LambdaLR(optimizer, schedule(config, total_steps=total_steps)), "step"
    interval = str(config.pop("interval", "epoch"))
    where = "trainer.scheduler"
    factory = call_target({**config, "_partial_": True}, root=None, where=where, error=RecipeError)
    try:
        scheduler = factory(optimizer)
    except (TypeError, ValueError, AttributeError) as problem:
        raise RecipeError(
            f"the schedule cannot be built: {problem}", where=where, value=settings.scheduler
        ) from problem
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise RecipeError(
            "the target must give a torch schedule that needs no metric",
            where=f"{where}._target_",
            value=config["_target_"],
        )
    return scheduler, interval


def schedule(config: Mapping[str, Any], *, total_steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the step, from 0 to `total_steps` - 1.

    Args:
        config: ``name``; ``warmup``, the share of all steps in which the factor rises; ``final``, the factor at the
            end. onecycle (Smith and Topin 2018) rises along a cosine from 1/25 over a quarter of the steps and falls
            along a cosine to 1/10,000; the others rise linearly, over none by default. exponential (Yu et al. 2020,
            "BigNAS") falls by the same share in each step and stays at `final`, 1/20 by default, once it is there.
        total_steps: Steps of the whole training.
    """
    name = config["name"]
    warmup = config.get("warmup")
    final = config.get("final")
    return partial(
        _factor,
        kind=name,
        warmup=total_steps * float(_WARMUP[name] if warmup is None else warmup),
        final=float(_FINAL[name] if final is None else final),
        total=max(total_steps - 1, 1),
    )


def _factor(step: int, *, kind: str, warmup: float, final: float, total: int) -> float:
    step = min(step, total)
    if step < warmup:
        share = step / warmup
        if kind == "onecycle":
            return _cosine(_ONECYCLE_START, 1.0, share)
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    share = (step - warmup) / (total - warmup) if total > warmup else 1.0
    if kind == "exponential":
        return float(max(final, _EXPONENTIAL_END**share))
    return _cosine(1.0, final, share)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
