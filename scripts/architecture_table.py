"""The table of a data set of architectures, and the card that says how it was made."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mil_cli.assess.scores.registry import SIZES
from mil_cli.recipe.schema import Recipe
from mil_cli.run.architectures import SCORED_SAMPLES
from mil_cli.run.environment import versions
from mil_cli.task.base import Task
from scripts.architecture_points import SCORED_SEED, SCORES
from scripts.comparison import Point, Result

_CLOCKS = ("cpu_seconds", "wall_seconds")
_PARTS = ("training", "validation")
_CARD = Path(__file__).with_name("architecture_card.md")

Known = Sequence[tuple[Point, Result]]
"""Points with what they gave, in the order in which they were asked for."""


def table(known: Known, decisions: Sequence[str], epochs: int) -> str:
    """Return the table as CSV, one training a row.

    Args:
        known: The trainings.
        decisions: The names of the space's decisions.
        epochs: Of each training.
    """
    stream = io.StringIO()
    rows = [_row(point, result, decisions, epochs) for point, result in known]
    writer = csv.DictWriter(stream, _columns(decisions, epochs), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _written(value) for name, value in row.items()} for row in rows)
    return stream.getvalue()


def _columns(decisions: Sequence[str], epochs: int) -> list[str]:
    scores = [name for score in SCORES for name in (score, *(f"{score}_{clock}" for clock in _CLOCKS))]
    curve = [name for epoch in range(1, epochs + 1) for name in _epoch_columns(epoch)]
    totals = [f"{part}_{clock}" for part in ("capture", *_PARTS) for clock in _CLOCKS]
    return ["id", "seed", *decisions, *SIZES, *scores, *totals, *curve, "quality", "test_quality"]


def _epoch_columns(epoch: int) -> list[str]:
    seconds = [f"{part}_{clock}_{epoch}" for part in _PARTS for clock in _CLOCKS]
    return [f"train_loss_{epoch}", f"val_{epoch}", *seconds]


def _row(point: Point, result: Result, decisions: Sequence[str], epochs: int) -> dict[str, Any]:
    row: dict[str, Any] = {"id": point["architecture"], "seed": point["seed"]}
    row |= {name: result["choices"].get(name) for name in decisions}
    row |= {name: result[name] for name in SIZES}
    for name, score in result["scores"].items():
        row |= {name: score["value"], **{f"{name}_{clock}": score[clock] for clock in _CLOCKS}}
    row |= {f"capture_{clock}": result["capture"][clock] for clock in _CLOCKS}
    for part in _PARTS:
        row |= {f"{part}_{clock}": math.fsum(epoch[part][clock] for epoch in result["epochs"]) for clock in _CLOCKS}
    for number, epoch in enumerate(result["epochs"], 1):
        row |= {f"train_loss_{number}": epoch.get("train_loss"), f"val_{number}": epoch.get("val")}
        row |= {f"{part}_{clock}_{number}": epoch[part][clock] for part in _PARTS for clock in _CLOCKS}
    # A training that collapsed has no quality; an empty cell would say that there was no training.
    row |= {name: math.nan if result[name] is None else result[name] for name in ("quality", "test_quality")}
    return row


def _written(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


@dataclass(frozen=True)
class Making:
    """How a data set was made.

    Attributes:
        recipe: Space, data, task and trainer.
        recipe_file: The recipe, as it was named.
        overrides: Of the recipe.
        task: Its task.
        architectures: How many were drawn.
        repeated: How many of them have further seeds.
        macs: Smallest and largest multiply-accumulates of those drawn.
        draw: The seed of the draw.
        machines: On what rows were computed.
        trainings: How many there are when all is done.
    """

    recipe: Recipe
    recipe_file: str
    overrides: Sequence[str]
    task: Task
    architectures: int
    repeated: int
    macs: tuple[float, float]
    draw: int
    machines: Sequence[str]
    trainings: int


def card(known: Known, making: Making, name: str) -> str:
    """Return what a reader of the table must know, as Markdown.

    Args:
        known: The trainings.
        making: How they were made.
        name: The table's file.
    """
    recipe, task = making.recipe, making.task
    overrides = f" --set {' '.join(making.overrides)}" if making.overrides else ""
    processors = sorted({result["processor"] or "an unknown processor" for _, result in known})
    return _CARD.read_text(encoding="utf-8").format(
        table=name,
        recipe=f"{making.recipe_file}{overrides}",
        contents="\n".join(_contents(known, making)),
        architectures=making.architectures,
        repeated=making.repeated,
        draw=making.draw,
        low=making.macs[0],
        high=making.macs[1],
        space=_plain({"_target_": recipe.model.target, **recipe.model.arguments}),
        data=_plain(recipe.data),
        task=_plain(recipe.task),
        trainer=_plain(recipe.trainer.model_dump(mode="json")),
        versions=", ".join(f"{package} {version}" for package, version in versions().items()),
        machines="; ".join([*making.machines, *processors]),
        scores=", ".join(f"`{score}`" for score in SCORES),
        samples=SCORED_SAMPLES,
        seed=SCORED_SEED,
        metric=task.metric_name,
        epochs=recipe.trainer.epochs,
        better="higher" if task.higher_is_better else "lower",
    )


def _contents(known: Known, making: Making) -> list[str]:
    by_architecture: dict[str, list[float]] = defaultdict(list)
    for point, result in known:
        if result["quality"] is not None:
            by_architecture[point["architecture"]].append(result["quality"])
    qualities = [value for values in by_architecture.values() for value in values]
    metric = making.task.metric_name
    there = f"{len(known)} of {making.trainings}" if len(known) < making.trainings else f"{len(known)}"
    lines = [f"{there} trainings, of {len({point['architecture'] for point, _ in known})} architectures."]
    if qualities:
        lines.append(f"Their {metric} on val lies between {min(qualities):.4f} and {max(qualities):.4f}.")
    if collapsed := sum(result["quality"] is None for _, result in known):
        lines.append(f"{collapsed} collapsed.")
    repeated = [statistics.variance(values) for values in by_architecture.values() if len(values) > 1]
    if repeated:
        deviation = statistics.mean(repeated) ** 0.5
        lines.append(
            f"The standard deviation over seeds is {deviation:.4f} (architectures with several: {len(repeated)})."
        )
    return lines


def _plain(value: Any) -> Any:
    """Return settings as a person would write them: without those that are left open."""
    if not isinstance(value, Mapping):
        return value
    return {key: _plain(one) for key, one in value.items() if one is not None}
