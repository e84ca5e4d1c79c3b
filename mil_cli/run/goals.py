"""Judges a final model against the goals of its recipe, and refuses goals that cannot be measured here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mil_cli.errors import GoalError
from mil_cli.measure.statistics import verdict
from mil_cli.training.quality import relative_drop

if TYPE_CHECKING:
    from mil_cli.device.profile import DeviceProfile
    from mil_cli.recipe.goals import Goals
    from mil_cli.stages.registry import StageConfig


@dataclass(frozen=True)
class Verdict:
    """One bound of one goal, judged.

    Attributes:
        name: The goal: quality, latency, size, macs, params, memory, energy or cost.
        kind: The bound: max, min, max_ratio or max_drop.
        bound: The number asked for, in base units (seconds, bytes, joules; ratios and drops as shares).
        value: The number reached, in the same unit.
        met: Whether the value keeps the bound.
    """

    name: str
    kind: str
    bound: float
    value: float
    met: bool


def _absolute(name: str, measurement: dict[str, Any]) -> float | None:
    match name:
        case "quality":
            return float(measurement["quality"]["value"])
        case "latency":
            latency = measurement["latency_ms"]
            return None if latency is None else latency["p50"] / 1000
        case "size":
            return _number(measurement["size_bytes"])
        case "memory":
            return _number(measurement["peak_memory_bytes"])
        case "energy":
            return _number(measurement["energy_j"])
        case "cost":
            return _number(measurement["cost_per_million"])
    return _number(measurement[name])


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def judge(goals: Goals, *, baseline: dict[str, Any], final: dict[str, Any]) -> list[Verdict]:
    """Judge every bound.

    Args:
        goals: The recipe's goals.
        baseline: The uncompressed model's measurement, as in the report.
        final: The compressed model's.

    Raises:
        GoalError: A figure that a goal is about was not measured.
    """
    verdicts = []
    for name, bounds in goals.asked().items():
        value, reference = _absolute(name, final), _absolute(name, baseline)
        for kind, bound in bounds.items():
            if kind == "max_drop":
                quality = final["quality"]
                reached = relative_drop(
                    float(reference or 0.0), float(value or 0.0), higher_is_better=quality["higher_is_better"]
                )
            elif kind == "max_ratio" and name == "latency":
                # The paired ratio, not the quotient of two medians: it is what the measurement protocol is made for.
                reached = float(final["latency_ms"]["ratio_to_baseline"])
            elif value is None or (kind == "max_ratio" and not reference):
                raise GoalError("this goal's figure was not measured", where=f"goals.{name}.{kind}", value=bound)
            else:
                reached = value / reference if kind == "max_ratio" and reference else value
            # A value exactly on its bound must not miss it by a rounding of the division.
            on_bound = math.isclose(reached, bound, rel_tol=1e-9)
            met = on_bound or (reached > bound if kind == "min" else reached < bound)
            verdicts.append(Verdict(name, kind, bound, reached, met))
    return verdicts


def slowdowns(
    baseline: dict[str, Any],
    stages: Sequence[tuple[str, dict[str, Any] | None]],
    quantizing: Collection[str] = (),
) -> list[str]:
    """Return a notice for each file that is slower than what it was made of, beyond what the measurement may err by.

    Smaller or with fewer operations is not faster on every device; no file shall ship that is slower without a word.
    Quantization is there to be faster: where it is not, that is told too.

    Args:
        baseline: The uncompressed model's measurement, as in the report.
        stages: Name and measurement after each stage, in order; None where none was taken.
        quantizing: Names of the stages that quantize.
    """
    latencies = [_latency(baseline), *(_latency(measured) for _, measured in stages)]
    steps = [(name, *pair) for (name, _), pair in zip(stages, itertools.pairwise(latencies), strict=True)]
    told = [_against_last(*step, quantizes=step[0] in quantizing) for step in steps] if len(steps) > 1 else []
    quantized = len(steps) == 1 and steps[0][0] in quantizing
    hint = "; measure.per_stage=true shows which stage it comes from" if None in latencies else ""
    return [notice for notice in (*told, _against_first(latencies[-1], hint, quantized=quantized)) if notice]


def _latency(measurement: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if measurement is None else measurement["latency_ms"]


def _against_last(
    name: str, before: dict[str, Any] | None, after: dict[str, Any] | None, *, quantizes: bool
) -> str | None:
    """Return a notice if a stage's file is slower than the one before it, or no faster though the stage quantizes."""
    if before is None or after is None:
        return None
    # Both are ratios to the baseline: apart if even the ends of their intervals that face each other are.
    low, high = (after["ratio_ci95"][one] / before["ratio_ci95"][1 - one] for one in (0, 1))
    ratio = after["ratio_to_baseline"] / before["ratio_to_baseline"]
    word = verdict(ratio, (low, high))
    if word == "slower":
        return f"stage '{name}' made the file slower, not faster: {ratio:.2f} times as slow as before it"
    if word != "faster" and quantizes:
        return f"stage '{name}' made the file no faster: {ratio:.2f} times the latency before it"
    return None


def _against_first(latency: dict[str, Any] | None, hint: str, *, quantized: bool) -> str | None:
    """Return a notice if the final file is slower than the uncompressed one, or no faster though only quantized."""
    if latency is None:
        return None
    low, high = latency["ratio_ci95"]
    ratio = latency["ratio_to_baseline"]
    word, figures = verdict(ratio, (low, high)), f"{ratio:.2f} times its latency (95 % {low:.2f} to {high:.2f})"
    if word == "slower":
        return f"the final file is slower than the uncompressed one on this device: {figures}{hint}"
    if word != "faster" and quantized:
        return f"the quantized file is no faster than the uncompressed one on this device: {figures}"
    return None


def remedies(slow: Sequence[str], stages: Sequence[tuple[str, StageConfig]]) -> list[str]:
    """Return what helps where `slowdowns` told something, by the names and settings of the stages."""
    return [
        f"stages.{name}.latency_aware=true leaves layers float that are slower with integers"
        for name, config in stages
        if slow and getattr(config, "latency_aware", None) is False
    ]


def check_measurable(goals: Goals, device: DeviceProfile, *, higher_is_better: bool) -> None:
    """Refuse, before anything runs, goals that this machine and device profile cannot measure.

    Raises:
        GoalError: Names the goal and what is missing.
    """
    from mil_cli.measure.energy import can_measure_energy

    if goals.energy is not None and not can_measure_energy(device):
        raise GoalError(
            "energy cannot be measured here: no readable power counter, and the device profile names no watts",
            where="goals.energy",
            hint="set device.watts to the target's power draw under load, or remove the goal",
        )
    if goals.cost is not None and device.price_per_hour is None:
        raise GoalError(
            "cost needs a price: the device profile has none",
            where="goals.cost",
            hint="set device.price_per_hour, or remove the goal",
        )
    if goals.quality is not None:
        wrong = "max" if higher_is_better else "min"
        if getattr(goals.quality, wrong) is not None:
            right = "min" if higher_is_better else "max"
            raise GoalError(
                f"the task's metric is better {'higher' if higher_is_better else 'lower'}, so {wrong} bounds nothing",
                where=f"goals.quality.{wrong}",
                hint=f"write {right} instead",
            )
