"""The goals of a recipe: bounds on the final model, as typed by the user and as plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mil_cli.units import parse_bytes, parse_count, parse_drop, parse_joules, parse_ratio, parse_seconds


def _positive(parse: Callable[[object], float]) -> BeforeValidator:
    """Parse with units and insist on a positive amount; None stays None."""

    def convert(text: object) -> float | None:
        if text is None:
            return None
        value = parse(text)
        if not 0 < value < float("inf"):
            raise ValueError(f"{text!r} can never be met; write an amount above 0")
        return value

    return BeforeValidator(convert)


def _drop(text: object) -> float | None:
    if text is None:
        return None
    value = parse_drop(text)
    if value <= -1:
        raise ValueError(f"{text!r} asks for a gain of 100 % or more; write a share such as 1%, or use min")
    return value


Ratio = Annotated[float | None, _positive(parse_ratio)]
Bytes = Annotated[float | None, _positive(parse_bytes)]
Seconds = Annotated[float | None, _positive(parse_seconds)]
Joules = Annotated[float | None, _positive(parse_joules)]
Count = Annotated[float | None, _positive(parse_count)]


class _Bound(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="after")
    def _bounds_something(self) -> _Bound:
        fields = type(self).model_fields
        if all(getattr(self, name) is None for name in fields):
            choices = " or ".join(f"{name}: ..." for name in fields)
            raise ValueError(f"the goal bounds nothing; write {choices}, or remove it")
        return self


class QualityGoal(_Bound):
    """Bounds on the task's metric, on the test split.

    Attributes:
        max_drop: Largest loss relative to the uncompressed model (0.01 is one percent).
        min: Smallest value, for a metric where higher is better.
        max: Largest value, for a metric where lower is better.
    """

    max_drop: Annotated[float | None, BeforeValidator(_drop)] = None
    min: float | None = Field(None, allow_inf_nan=False)
    max: float | None = Field(None, allow_inf_nan=False)


class LatencyGoal(_Bound):
    """Bounds on the median latency of one sample: `max` in seconds, `max_ratio` to the uncompressed file's."""

    max_ratio: Ratio = None
    max: Seconds = None


class BytesGoal(_Bound):
    """Bounds on bytes: `max`, and `max_ratio` to the uncompressed file's."""

    max_ratio: Ratio = None
    max: Bytes = None


class CountGoal(_Bound):
    """Bounds on a count: `max`, and `max_ratio` to the uncompressed model's."""

    max_ratio: Ratio = None
    max: Count = None


class EnergyGoal(_Bound):
    """Bounds on the energy of one inference: `max` in joules, `max_ratio` to the uncompressed file's."""

    max_ratio: Ratio = None
    max: Joules = None


class CostGoal(_Bound):
    """Bounds on the price of a million inferences, in the device profile's currency."""

    max_ratio: Ratio = None
    max: Count = None


class Goals(BaseModel):
    """What the final model must meet; a goal that is None is not asked for.

    Attributes:
        quality: The task's metric on the test split.
        latency: Median latency of one sample on the device, in seconds.
        size: Bytes of the exported file.
        macs: Multiply-accumulates of one sample.
        params: Number of parameters.
        memory: Peak memory beyond the bare runtime's, in bytes.
        energy: Joules of one inference.
        cost: Price of a million inferences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    quality: QualityGoal | None = None
    latency: LatencyGoal | None = None
    size: BytesGoal | None = None
    macs: CountGoal | None = None
    params: CountGoal | None = None
    memory: BytesGoal | None = None
    energy: EnergyGoal | None = None
    cost: CostGoal | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_empty_goal(cls, content: Any) -> Any:
        if isinstance(content, dict):
            return {name: {} if bounds is None else bounds for name, bounds in content.items()}
        return content

    def asked(self) -> dict[str, dict[str, float]]:
        """Return the bounds that are set: goal name -> {bound name: plain number}."""
        return self.model_dump(mode="json", exclude_none=True)
