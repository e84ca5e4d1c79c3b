"""Coordinates of the charts on the pages; the templates draw them as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mil_cli.report import text
from mil_cli.report.load import Report
from mil_cli.report.view import speed

WIDTH, HEIGHT = 520.0, 240.0
_NEAR = 9.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 14.0, 12.0, 40.0


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where it is and what it says."""

    position: float
    label: str


@dataclass(frozen=True)
class Sample:
    """What a scatter chart shows of one model.

    Attributes:
        x: The horizontal figure; less is better.
        y: The vertical figure.
        label: The short text beside the dot.
        title: The text that is shown when it is pointed at.
        on_front: Whether it is on the front.
    """

    x: float
    y: float
    label: str
    title: str
    on_front: bool


@dataclass(frozen=True)
class Dot:
    """A point of a scatter chart.

    Attributes:
        x: Its place from the left.
        y: Its place from the top.
        label: The short text beside it; empty for none.
        title: The text that is shown when it is pointed at.
        kind: ``front`` or ``point``; its style.
    """

    x: float
    y: float
    label: str
    title: str
    kind: str


@dataclass(frozen=True)
class Chart:
    """A chart with two axes.

    Attributes:
        title: What it shows.
        x_label: The name of the horizontal axis.
        y_label: The name of the vertical axis.
        x_ticks: Its marks.
        y_ticks: Its marks.
        lines: Lines by style, each an SVG list of points.
        dots: Points.
        width: Of the drawing.
        height: Of the drawing.
    """

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Mapping[str, str]
    dots: Sequence[Dot]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Span:
    """A model's latencies as a horizontal bar; positions are shares of the widest, from 0 to 1.

    Attributes:
        name: The model.
        p50: Where the bar for the median ends.
        p90: Where the 90th percentile lies.
        p99: Where the whisker to the 99th percentile ends.
        text: The figures.
        comparison: How it compares with the uncompressed model.
        final: Whether it is the file that ships.
    """

    name: str
    p50: float
    p90: float
    p99: float
    text: str
    comparison: str
    final: bool


class Axis:
    """A scale from values to places, with round marks.

    Args:
        values: What must fit.
        start: The place of the lowest value.
        end: The place of the highest.
        logarithmic: Whether equal ratios are equally far apart; all values must be positive.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, *, logarithmic: bool = False) -> None:
        self._log = logarithmic
        low, high = self._map(min(values)), self._map(max(values))
        room = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
        self._low, self._high = low - room, high + room
        self._start, self._end = start, end

    def _map(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def place(self, value: float) -> float:
        """Return where a value lies."""
        share = (self._map(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self, write: Callable[[float], str]) -> list[Tick]:
        """Return round marks within the scale."""
        values = _round_logarithmic(self._low, self._high) if self._log else _round_linear(self._low, self._high)
        return [Tick(self.place(value), write(value)) for value in values]


def _round_linear(low: float, high: float, wanted: int = 5) -> list[float]:
    raw = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw)
    first = math.ceil(low / step)
    return [step * number for number in range(first, math.floor(high / step) + 1)]


def _round_logarithmic(low: float, high: float) -> list[float]:
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        decades = range(math.floor(low), math.ceil(high) + 1)
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        found = [value for value in found if low <= math.log10(value) <= high]
        if len(found) >= 3:
            return found
    return _round_linear(10**low, 10**high)


def mark(value: float) -> str:
    """Write a round mark of an axis, without the tail of binary fractions."""
    return f"{value:.6g}"


def scatter(
    heading: str,
    samples: Sequence[Sample],
    *,
    x_label: str,
    y_label: str,
    write_x: Callable[[float], str],
    higher_is_better: bool,
    logarithmic: bool = False,
) -> Chart | None:
    """Return a chart of models, those that are best in both figures joined by a line. None if there are no models.

    Args:
        heading: What it shows.
        samples: The models.
        x_label: The name of the horizontal axis.
        y_label: The name of the vertical axis.
        write_x: Writes a mark of the horizontal axis.
        higher_is_better: Whether more of the vertical figure is better.
        logarithmic: Whether the horizontal axis is.
    """
    if not samples:
        return None
    xs = [sample.x for sample in samples]
    x_axis = Axis(xs, LEFT, WIDTH - RIGHT, logarithmic=logarithmic and min(xs) > 0)
    y_axis = Axis([sample.y for sample in samples], HEIGHT - BOTTOM, TOP)
    dots = [
        Dot(
            x_axis.place(sample.x),
            y_axis.place(sample.y),
            sample.label,
            sample.title,
            "front" if sample.on_front else "point",
        )
        for sample in samples
    ]
    dots = _join_labels(dots)
    best = _staircase(samples, higher_is_better=higher_is_better)
    line = " ".join(f"{x_axis.place(sample.x)},{y_axis.place(sample.y)}" for sample in best)
    lines = {"front": line} if len(best) > 1 else {}
    return Chart(heading, x_label, y_label, x_axis.ticks(write_x), y_axis.ticks(mark), lines, dots)


def _join_labels(dots: Sequence[Dot]) -> list[Dot]:
    """Return the dots, those that lie on one another with one label for all of them."""
    joined: list[Dot] = []
    for dot in dots:
        near = next(
            (at for at, other in enumerate(joined) if math.dist((dot.x, dot.y), (other.x, other.y)) < _NEAR), None
        )
        if near is None:
            joined.append(dot)
            continue
        first = joined[near]
        label = ", ".join(one for one in (first.label, dot.label) if one)
        joined[near] = replace(first, label=label, title=f"{first.title}\n{dot.title}")
        joined.append(replace(dot, label="", title=f"{first.title}\n{dot.title}"))
    return joined


def _staircase(samples: Sequence[Sample], *, higher_is_better: bool) -> list[Sample]:
    """Return the samples that no other beats in both figures, from left to right."""
    sign = -1 if higher_is_better else 1
    best: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: (sample.x, sign * sample.y)):
        if not best or sign * sample.y < sign * best[-1].y:
            best.append(sample)
    return best


def training_chart(history: Sequence[Mapping[str, Any]], *, metric: str) -> Chart | None:
    """Return the course of a training: the metric on val by epoch, or the loss where val was not evaluated."""
    quality = [(entry["epoch"], value) for entry in history if (value := _number(entry.get("val"))) is not None]
    losses = [(entry["epoch"], value) for entry in history if (value := _number(entry.get("train_loss"))) is not None]
    series, label, style = (quality, f"{metric} (val)", "quality") if len(quality) > 1 else (losses, "loss", "loss")
    if len(series) < 2:
        return None
    x_axis = Axis([epoch for epoch, _ in series], LEFT, WIDTH - RIGHT)
    y_axis = Axis([value for _, value in series], HEIGHT - BOTTOM, TOP)
    line = " ".join(f"{x_axis.place(epoch)},{y_axis.place(value)}" for epoch, value in series)
    epochs = [tick for tick in x_axis.ticks(mark) if "." not in tick.label]
    return Chart(f"{label} by epoch", "epoch", label, epochs, y_axis.ticks(mark), {style: line}, [])


def convergence_chart(convergence: Mapping[str, Any], *, metric: str) -> Chart | None:
    """Return the courses of a distilled training and of the same student's plain one, which is dashed, by step."""
    curves = {"quality": convergence["distilled"], "front": convergence["plain"]}
    points = [point for curve in curves.values() for point in curve]
    if any(len(curve) < 2 for curve in curves.values()):
        return None
    x_axis = Axis([steps for steps, _ in points], LEFT, WIDTH - RIGHT)
    y_axis = Axis([value for _, value in points], HEIGHT - BOTTOM, TOP)
    lines = {
        style: " ".join(f"{x_axis.place(steps)},{y_axis.place(value)}" for steps, value in curve)
        for style, curve in curves.items()
    }
    title = f"{metric} (val) by step: distilled, and plain training of the same student (dashed)"
    return Chart(title, "step", f"{metric} (val)", x_axis.ticks(mark), y_axis.ticks(mark), lines, [])


def _number(value: Any) -> float | None:
    if isinstance(value, Mapping):
        value = value.get("value")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def latency_spans(report: Report) -> list[Span]:
    """Return the latencies of all models that were timed: the uncompressed one, stages, the final one."""
    models: list[tuple[str, Mapping[str, Any], bool]] = []
    if report["baseline"].get("latency_ms"):
        models.append(("uncompressed", report["baseline"]["latency_ms"], False))
    for stage in report["stages"][:-1]:
        if stage["measurement"].get("latency_ms"):
            models.append((f"after {stage['name']}", stage["measurement"]["latency_ms"], False))
    if report["final"].get("latency_ms"):
        models.append(("final", report["final"]["latency_ms"], True))
    widest = max((latency["p99"] for _, latency, _ in models), default=0.0)
    if not widest:
        return []
    return [
        Span(
            name=name,
            p50=latency["p50"] / widest,
            p90=latency["p90"] / widest,
            p99=latency["p99"] / widest,
            text=" / ".join(text.milliseconds(latency[key]) for key in ("p50", "p90", "p99")),
            comparison="" if name == "uncompressed" else speed(latency),
            final=final,
        )
        for name, latency, final in models
    ]
