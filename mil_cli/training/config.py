"""The settings of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_SCHEDULES = ("onecycle", "cosine", "exponential", "constant")


class TrainerConfig(BaseModel):
    """How a model is trained; stages override single keys.

    Attributes:
        epochs: Passes over the training split.
        batch_size: Samples per step, over all processes.
        optimizer: ``_target_`` of a torch optimizer and its arguments. One-dimensional parameters (biases, norms) get
            no weight decay.
        learning_rate: Overrides the optimizer's ``lr``: one key to sweep over.
        scheduler: ``name`` (onecycle, cosine, exponential, constant) with ``warmup`` (share of all steps) and ``final``
            (share of the learning rate that is left at the end); or ``_target_`` of a torch scheduler, with
            ``interval`` (epoch or step).
        precision: As lightning-fabric names it; ``32-true``, ``bf16-mixed`` (slow on CPUs without it) or ``16-mixed``.
        gradient_clip: Largest norm of all gradients together; None: not clipped.
        ema: Decay of an exponential moving average of the weights, which then is what training gives; None: off.
        early_stopping: Evaluations on val without a better one after which training stops, with the best weights; None:
            off.
        evaluate_every: Epochs between evaluations on val; the last epoch is always evaluated.
        divergence: Training stops, with the best weights, if an epoch's mean loss exceeds this many times the first
            epoch's; a loss that is not finite always stops it. None: only that.
        channels_last: Memory format of images; ``auto`` tries it where the model has 2-d convolutions.
        accelerator: As lightning-fabric names it: ``cpu``, ``cuda``, ``auto``.
        devices: Number of devices, or ``auto``; the launcher's where torchrun starts the processes.
        checkpoint_every_seconds: Time between checkpoints inside an epoch; 0: after every step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(10, ge=1)
    batch_size: int = Field(128, ge=1)
    optimizer: dict[str, Any] = Field(
        default_factory=lambda: {
            "_target_": "torch.optim.SGD",
            "lr": 0.1,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 5e-4,
        }
    )
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    scheduler: dict[str, Any] = Field(default_factory=lambda: {"name": "onecycle"})
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    gradient_clip: float | None = Field(None, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)
    early_stopping: int | None = Field(None, ge=1)
    evaluate_every: int = Field(1, ge=1)
    divergence: float | None = Field(20.0, gt=1)
    channels_last: bool | Literal["auto"] = "auto"
    accelerator: str = "cpu"
    devices: int | Literal["auto"] = "auto"
    checkpoint_every_seconds: float = Field(30.0, ge=0)

    @field_validator("scheduler", mode="before")
    @classmethod
    def _scheduler_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_parts(self) -> TrainerConfig:
        if not isinstance(self.optimizer.get("_target_"), str):
            raise ValueError("optimizer needs a _target_, such as torch.optim.SGD")
        check_scheduler(self.scheduler)
        return self

    def judged_at_the_end(self) -> Self:
        """Return the settings without evaluations before the last epoch's, which decide nothing but early stopping."""
        return self if self.early_stopping is not None else self.model_copy(update={"evaluate_every": self.epochs})

    def merged(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings with overrides over them, as plain values to validate.

        Overrides of `optimizer` and `scheduler` are merged key by key, unless they choose another one (``_target_`` or
        ``name``).
        """
        return merged_settings(self.model_dump(), overrides)


def merged_settings(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return trainer settings, all of them or some, with overrides over them; neither is validated.

    Args:
        settings: Plain values.
        overrides: Those of `optimizer` and `scheduler` are merged key by key, unless they choose another one
            (``_target_`` or ``name``).
    """
    result = dict(settings)
    for key, value in overrides.items():
        old = result.get(key)
        old = {"name": old} if isinstance(old, str) else old  # a scheduler may be written by its name alone
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not ({"_target_", "name"} & set(value)):
            result[key] = {**old, **value}
        else:
            result[key] = value
    return result


def check_scheduler(scheduler: Mapping[str, Any]) -> None:
    """Check the form of a scheduler's settings.

    Raises:
        ValueError: What is wrong with it.
    """
    if "_target_" in scheduler:
        if scheduler.get("interval", "epoch") not in ("epoch", "step"):
            raise ValueError("scheduler.interval is epoch or step")
        return
    name = scheduler.get("name")
    if name not in _SCHEDULES:
        raise ValueError(f"scheduler needs a name ({', '.join(_SCHEDULES)}) or a _target_, and has {name!r}")
    unknown = sorted(set(scheduler) - {"name", "warmup", "final"})
    if unknown:
        raise ValueError(f"scheduler has no key {unknown[0]!r}; it takes name, warmup, final")
    warmup, final = scheduler.get("warmup"), scheduler.get("final")
    for key, value, low, high in (("warmup", warmup, 0.0, 1.0), ("final", final, 0.0, 1.0)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high
        ):
            raise ValueError(f"scheduler.{key} is a share of at least 0 and below 1, and is {value!r}")
