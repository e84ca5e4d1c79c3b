"""Do nets cut out of a supernet do as well as they do when each is trained alone? The same nets, paired seeds.

A recipe's model is a space, the first stage of its chain a one-shot search. Its smallest and its largest architecture
are taken, and some between them, before anything is trained. For each seed the supernet is trained by that stage, and
each architecture judged as it is, without a training of its own; and each is trained alone, by the recipe's trainer
without what that stage says over it. All are scored on the test split. Points that were computed are kept beside the
page, so that an interrupted comparison goes on.

    python -m scripts.compare_supernet recipes/nas/bignas_fashion.yaml --jobs 2
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mil_cli.errors import RecipeError
from mil_cli.events import SilentProgress
from mil_cli.models.user_code import importable
from mil_cli.recipe.load import load_recipe
from mil_cli.recipe.schema import Recipe
from mil_cli.run.surroundings import build_surroundings, source_model
from mil_cli.spaces import Architecture, CostCounter, DesignedSpace, sample_balanced
from mil_cli.stages.context import Context
from mil_cli.stages.nas.one_shot import Judge, OneShotConfig
from mil_cli.stages.surroundings import Surroundings
from mil_cli.training.evaluate import evaluate
from scripts.comparison import Point, Result, Rows, carry_out, origin_of, paired_interval, parser_of, point_of

SHARED, ALONE = "shared", "alone"
_DRAW = 0
"""Seed of the architectures that are drawn."""


def main(words: Sequence[str] | None = None) -> int:
    """Compute the missing points and write the page; return 1 if a point failed."""
    parser = parser_of(__doc__, methods=(SHARED, ALONE), out=Path("docs/results/supernet.md"))
    parser.add_argument("--count", type=int, default=5, help="architectures, three or more")
    arguments = parser.parse_args(words)
    recipe = load_recipe(arguments.recipe, arguments.set)
    if arguments.count < 3:
        parser.error("--count takes a number of at least 3")
    origins = {
        method: origin_of(recipe, Path(__file__), method, arguments.count, code=("stages", "training", "spaces"))
        for method in (SHARED, ALONE)
    }
    columns = [{"net": number} for number in range(arguments.count)]
    phases = [
        [
            point
            for method in arguments.methods
            for point in (
                [point_of(origins, method, {}, seed)]
                if method == SHARED
                else [point_of(origins, method, column, seed) for column in columns]
            )
        ]
        for seed in arguments.seeds
    ]
    work = partial(_run, arguments.count)
    return carry_out(arguments, work, phases, partial(_page, arguments, origins))


def _run(count: int, file: Path, overrides: Sequence[str], location: Path, point: Point) -> Result:
    """Return the quality on test of an architecture trained alone, or of all of them in the supernet."""
    torch.set_num_threads(1)
    recipe = load_recipe(file, [*overrides, f"seed={point['seed']}"])
    name, config = _search(recipe)
    with importable(recipe.root), TemporaryDirectory(prefix="compare-") as temporary:
        around = build_surroundings(recipe)
        model = source_model(recipe, around)
        context = Context(name=name, surroundings=around, progress=SilentProgress(), workspace=Path(temporary))
        space = context.space()
        args, kwargs = model.batch_input(1)
        counter = CostCounter(space, args, kwargs)
        drawn = _drawn(space, counter, count)
        if point["method"] == SHARED:
            judge = Judge(config.shared(model, context), config, context)
            return {"quality": [_test(judge.module(one), around) for one in drawn]}
        architecture = drawn[point["net"]]
        start = context.capture(space.build(architecture, seed=context.seed))
        trained = context.train(start, settings=context.trainer(), doing="training alone").model
        return {
            "quality": _test(trained, around),
            "macs": counter.macs(architecture),
            "params": counter.params(architecture),
            "net": str(architecture),
        }


def _search(recipe: Recipe) -> tuple[str, OneShotConfig]:
    name = recipe.chain[0]
    config = recipe.stages[name]
    if not isinstance(config, OneShotConfig):
        raise RecipeError("the first stage must be a one-shot search, such as nas/bignas", where="chain", value=name)
    return name, config


def _drawn(space: DesignedSpace, counter: CostCounter, count: int) -> list[Architecture]:
    """Return the smallest and the largest architecture, and others between them, in the order of their operations."""
    low, high = counter.macs(space.smallest), counter.macs(space.largest)
    between = sample_balanced(
        space,
        lambda one: math.log(counter.macs(one)),
        torch.Generator().manual_seed(_DRAW),
        count=count - 2,
        low=math.log(low + 1),
        high=math.log(high),
        strata=count - 2,
    )
    return [space.smallest, *sorted(between, key=counter.macs), space.largest]


def _test(module: Any, around: Surroundings) -> float:
    return evaluate(module, task=around.task, split=around.data.test, split_name="test").value


def _page(arguments: argparse.Namespace, origins: Mapping[str, str], rows: Rows) -> list[str]:
    """Return the page's lines: each net's quality in the supernet beside that of the same net trained alone."""
    points, lines = [], []
    for number in range(arguments.count):
        pairs: list[tuple[Result | None, Result | None]] = []
        for seed in arguments.seeds:
            own = [point_of(origins, SHARED, {}, seed), point_of(origins, ALONE, {"net": number}, seed)]
            points += own
            pairs.append((rows.result(own[0]), rows.result(own[1])))
        lines.append(_line(number, pairs))
    seeds = ", ".join(map(str, arguments.seeds))
    return [
        "# Nets of a supernet beside the same nets trained alone",
        "",
        f"`{arguments.recipe}`; seeds {seeds}; {'; '.join(rows.computed_on(points))}.",
        "Quality on test in per cent, means over the seeds; the drop is relative to the net trained alone, with its",
        "95 % interval over seeds.",
        "",
        "| operations | parameters | in the supernet | alone | relative drop | seeds |",
        "|---|---|---|---|---|---|",
        *lines,
    ]


def _line(number: int, pairs: Sequence[tuple[Result | None, Result | None]]) -> str:
    """Return a net's line, from the results of each seed: those of the supernet, and that of the net alone."""
    net = next((alone for _, alone in pairs if alone is not None), None)
    sizes = "- | -" if net is None else f"{net['macs']:,} | {net['params']:,}"
    shared = [None if one is None else 100 * one["quality"][number] for one, _ in pairs]
    alone = [None if one is None else 100 * one["quality"] for _, one in pairs]
    drops = [100 * (1 - one / other) for one, other in zip(shared, alone, strict=True) if one and other]
    interval = paired_interval([(drop, 0.0) for drop in drops])
    shown = "" if interval is None else f" ({interval[0]:+.2f} to {interval[1]:+.2f})"
    drop = f"{statistics.mean(drops):+.2f} %{shown}" if drops else "-"
    return f"| {sizes} | {_mean(shared)} | {_mean(alone)} | {drop} | {len(drops)} |"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.2f}" if known else "-"


if __name__ == "__main__":
    sys.exit(main())
