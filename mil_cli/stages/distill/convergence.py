"""How fast a distilled training converges, beside the plain training of the same student at equal steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mil_cli.training.loop import FitResult

_LEVELS = (0.9, 0.95)


def compare(distilled: FitResult, plain: FitResult, *, higher_is_better: bool) -> dict[str, Any]:
    """Return both curves and the steps that each needs to reach given qualities, as JSON-able facts.

    The qualities lie on the way from plain training's first evaluation to its last: 90 %, 95 % and all of it. Steps are
    those of the first evaluation that is at least as good.

    Args:
        distilled: The distilled training.
        plain: The plain one.
        higher_is_better: Of the metric.

    Returns:
        ``distilled`` and ``plain``: [steps, quality on val] of each evaluation; ``seconds`` and ``plain_seconds``;
        ``reached``: for each quality ``quality``, ``steps`` and ``plain_steps`` (None: never).
    """
    curves = [
        [[entry["steps"], entry["val"]] for entry in result.history if "val" in entry] for result in (distilled, plain)
    ]
    taught, alone = curves
    levels = []
    if alone:
        first, last = alone[0][1], alone[-1][1]
        # All of it is the last value itself, which the sum may miss by its rounding.
        between = {first + share * (last - first) for share in _LEVELS}
        levels = sorted({*between, last}, reverse=not higher_is_better)
    return {
        "distilled": taught,
        "plain": alone,
        "seconds": distilled.seconds,
        "plain_seconds": plain.seconds,
        "reached": [
            {
                "quality": level,
                "steps": steps_to(taught, level, higher_is_better=higher_is_better),
                "plain_steps": steps_to(alone, level, higher_is_better=higher_is_better),
            }
            for level in levels
        ],
    }


def after(before: Sequence[FitResult], last: FitResult) -> FitResult:
    """Return a training as one that began with others, on which it rests: their steps and seconds count as its own.

    Args:
        before: The trainings that came first.
        last: The one that rests on them.
    """
    steps = steps_of(before)
    history = [{**entry, "steps": steps + entry["steps"]} for entry in last.history]
    return replace(last, history=history, seconds=last.seconds + sum(result.seconds for result in before))


def steps_of(results: Sequence[FitResult]) -> int:
    """Return how many steps some trainings took together."""
    return sum(int(result.history[-1]["steps"]) for result in results if result.history)


def steps_to(curve: list[list[float]], quality: float, *, higher_is_better: bool) -> int | None:
    """Return the steps of the first point of a curve of [steps, quality] that reaches a quality, or None."""
    sign = 1 if higher_is_better else -1
    return next((int(steps) for steps, value in curve if sign * value >= sign * quality), None)
