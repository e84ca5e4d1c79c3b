"""The latency of one model beside another, as their files run on the device, and what it corrects: predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Generic, TypeVar

from mil_cli.export.onnx import export_onnx
from mil_cli.export.session import feeds_of

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.measure.types import Latency
    from mil_cli.stages.context import Context

Made = TypeVar("Made")

_MEASUREMENTS = 4

_AIM = 0.98
"""What share of the goal a corrected choice aims at, so that noise does not carry it over the goal."""

_OFF = 0.02
"""How far below that, as a share of the goal, a measured latency is near enough."""

WHOLE = "whole model"
"""The key, among those of operators, of what the model before a stage takes when it is measured as a whole."""


def latency_ratio(model: Model, reference: Model, context: Context) -> float:
    """Return a model's measured latency over that of another with the same inputs, by the protocol of all latencies.

    Args:
        model: The model.
        reference: What it is compared with.
        context: Gives the device, and a training sample to run on.

    Raises:
        ExportError: One of them cannot be exported.
        MeasureError: The runtime failed on a file.
    """
    return latency_ratios([model], reference, context)[0]


def latency_ratios(models: Sequence[Model], reference: Model, context: Context) -> list[float]:
    """Do as `latency_ratio` does for several models, which are timed side by side."""
    return [measured.ratio_to_baseline for measured in _latencies([reference, *models], context)[1:]]


def latency_seconds(model: Model, context: Context) -> float:
    """Return the median seconds that a model takes, by the protocol of all latencies.

    Args:
        model: The model.
        context: Gives the device, and a training sample to run on.

    Raises:
        ExportError: It cannot be exported.
        MeasureError: The runtime failed on its file.
    """
    (measured,) = _latencies([model], context)
    return measured.p50 / 1e3


def _latencies(models: Sequence[Model], context: Context) -> list[Latency]:
    args, kwargs = next(iter(context.calibration(samples=1, batch_size=1, model=models[0])))
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.onnx" for number in range(len(models))]
        for model, file in zip(models, files, strict=True):
            export_onnx(model, file, device=context.device)
        return context.latencies(files, feeds=feeds_of(models[0].spec, args, kwargs))


@dataclass(frozen=True)
class Choice(Generic[Made]):
    """What was chosen for one predicted target.

    Attributes:
        chosen: What tells it from other choices, by ``==``.
        predicted: Its predicted seconds; less than the target where choices are coarse.
        model: Makes the model that it is.
        made: What the one who chose wants back.
        worth: What it is worth beside other choices, more being better; None where what is slower has lost less, as
            cuts have of which each holds all that the next one removes.
    """

    chosen: object
    predicted: float
    model: Callable[[], Model]
    made: Made
    worth: float | None = None

    def standing(self, seconds: float) -> tuple[float, float]:
        """Return what choices that keep the goal are compared by, the largest being the best.

        Args:
            seconds: What this one takes when it is measured.
        """
        return (seconds, 0.0) if self.worth is None else (self.worth, -seconds)


class Correction:
    """Corrects a predicted latency by measuring: a choice counts by what the whole model takes beside the original.

    What is compared is a ratio, brought to the scale of predictions by those of the original; for a target in seconds
    `Amount` puts predictions themselves on the scale of what the original takes. All decisions follow
    from what was measured, so that a run that goes on after an interruption decides as it would have done.

    Args:
        original: The model before the stage.
        start: Its predicted seconds.
        goal: Predicted seconds to keep.
        context: Gives device, samples and progress.
        measured: Predicted and measured seconds of what was measured before an interruption; new ones are added.
        keep: Called after each new one, so that they outlive an interruption.
        active: Whether to measure at all; else predictions are believed.
    """

    def __init__(
        self,
        original: Model,
        *,
        start: float,
        goal: float,
        context: Context,
        measured: list[list[float]],
        keep: Callable[[], None],
        active: bool,
    ) -> None:
        self._original, self._start, self._goal, self._context = original, start, goal, context
        self._measured, self._keep = measured, keep
        self.active = active and goal < start

    def search(self, find: Callable[[float, int], Choice[Made]]) -> tuple[Made, float | None]:
        """Choose for the goal, and again for a target that what was measured corrects, until the goal is kept.

        Args:
            find: Given predicted seconds and how many choices there were before, returns a choice.

        Returns:
            Of the choices that keep the goal when measured the one that is worth most, or the slowest where nothing
            says what they are worth; else the fastest. And its measured seconds, None where nothing is measured.
        """
        if not self.active:
            return find(self._goal, 0).made, None
        tried: list[tuple[float, Choice[Made]]] = []
        target = self._goal
        while len(tried) < _MEASUREMENTS:
            found = find(target, len(tried))
            if any(found.chosen == other.chosen for _, other in tried):
                break
            if len(self._measured) == len(tried):
                self.measure(found.predicted, found.model())
            _, seconds = self._measured[len(tried)]
            tried.append((seconds, found))
            if (_AIM - _OFF) * self._goal <= seconds <= self._goal:
                break
            # From what the choice takes, which may be much less than was asked for: a miss then rules it out.
            target = min(target, found.predicted) * _AIM * self._goal / seconds
        within = [pair for pair in tried if pair[0] <= self._goal]
        if within:
            seconds, best = max(within, key=lambda pair: pair[1].standing(pair[0]))
        else:
            seconds, best = min(tried, key=lambda pair: pair[0])
            self._tell_missed(seconds, f"none of {len(tried)} choices keeps")
        return best.made, seconds

    def measure(self, predicted: float, model: Model) -> None:
        """Measure a model of which some seconds are predicted."""
        self._measured.append([predicted, self._start * latency_ratio(model, self._original, self._context)])
        self._keep()

    def conclude(self, predicted: float, model: Model) -> None:
        """Measure a model that cannot become smaller, unless it was measured last, and tell if it is above the goal."""
        if not self.active:
            return
        if not self._measured or self._measured[-1][0] != predicted:
            self.measure(predicted, model)
        _, seconds = self._measured[-1]
        if seconds > self._goal:
            self._tell_missed(seconds, "the smallest model does not keep")

    @property
    def seconds(self) -> float | None:
        """What was measured last."""
        return self._measured[-1][1] if self._measured else None

    def next_stop(self) -> float | None:
        """Return the predicted seconds down to which a model that shrinks bit by bit goes before it is measured next.

        It stops half the way, since what is gone does not come back; then where the goal should hold by what was
        measured last. At the first of these stops two forms of error are thinkable, one of what is left and one of what
        was saved, and the more cautious one counts.

        Returns:
            The seconds; None when the goal is kept, or enough was measured.
        """
        if not self.active:
            return self._goal
        if not self._measured:
            return float((self._start * self._goal) ** 0.5)
        predicted, seconds = self._measured[-1]
        if seconds <= self._goal:
            return None
        if len(self._measured) == _MEASUREMENTS:
            self._tell_missed(seconds, f"after {_MEASUREMENTS} measurements the model does not keep")
            return None
        aim = _AIM * self._goal
        by_what_is_left = predicted * aim / seconds
        if len(self._measured) > 1 or seconds >= self._start:
            return by_what_is_left
        saved = (self._start - predicted) * (self._start - aim) / (self._start - seconds)
        return max(by_what_is_left, self._start - saved)

    def _tell_missed(self, seconds: float, what: str) -> None:
        name, goal, fastest = self._context.name, 1e3 * self._goal, 1e3 * seconds
        self._context.progress.notice(f"{name}: measured, {what} {goal:.3g} ms; the fastest takes {fastest:.3g} ms")
