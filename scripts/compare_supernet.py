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
        for method in arguments.methods
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
        pairs, net = [], None
        for seed in arguments.seeds:
            own = [point_of(origins, SHARED, {}, seed), point_of(origins, ALONE, {"net": number}, seed)]
            points += own
            shared, alone = (rows.result(point) for point in own)
            net = alone or net
            if shared is not None and alone is not None:
                pairs.append((100 * shared["quality"][number], 100 * alone["quality"]))
        lines.append(_line(net, pairs))
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


def _line(net: Result | None, pairs: Sequence[tuple[float, float]]) -> str:
    sizes = "- | -" if net is None else f"{net['macs']:,} | {net['params']:,}"
    if not pairs:
        return f"| {sizes} | - | - | - | 0 |"
    shared, alone = (statistics.mean(column) for column in zip(*pairs, strict=True))
    drops = [(100 * (1 - one / other), 0.0) for one, other in pairs]
    interval = paired_interval(drops)
    shown = "" if interval is None else f" ({interval[0]:+.2f} to {interval[1]:+.2f})"
    drop = statistics.mean(one for one, _ in drops)
    return f"| {sizes} | {shared:.2f} | {alone:.2f} | {drop:+.2f} %{shown} | {len(pairs)} |"


if __name__ == "__main__":
    sys.exit(main())
