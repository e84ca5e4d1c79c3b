"""A data set of architectures: what each is worth when it is trained, and what was known of it before that.

Architectures of a recipe's space are drawn once, evenly over their operations, and trained: all of them with one seed
first, in a random order, then some of them with further seeds. Whatever is there by then makes the table (CSV) and its
card. Trainings are kept beside them, one JSON object a line, as they end, so that an interrupted script goes on; the
lines that several machines made of their shards can be joined by ``cat``.

    python -m scripts.build_architecture_dataset scripts/small_nets.yaml --jobs 2
    python -m scripts.build_architecture_dataset scripts/small_nets.yaml --known-only
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from mil_cli.data.source import build_data
from mil_cli.files import write_text
from mil_cli.models.user_code import importable
from mil_cli.recipe.load import load_recipe
from mil_cli.recipe.schema import Recipe
from mil_cli.run import architectures
from mil_cli.run.surroundings import space_of
from mil_cli.spaces import Architecture, CostCounter, DesignedSpace, sample_balanced
from mil_cli.stages.surroundings import fingerprint_of
from mil_cli.task.source import build_task
from scripts import architecture_points
from scripts.architecture_points import SCORED_SEED, train_point
from scripts.architecture_table import Making, card, table
from scripts.comparison import Limits, Point, Result, Rows, compute, origin_of
from scripts.pool import shard

_CODE = ("assess/scores", "data", "spaces", "training")
_PRELOAD = ("scripts.architecture_points", "torch.export", "torchmetrics.classification")
_ID_LENGTH = 10
"""Hexadecimal digits of an architecture's name."""


def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, write table and card; return 1 if a training failed or none is known."""
    arguments = _arguments(words)
    recipe = load_recipe(arguments.recipe, arguments.set)
    if recipe.trainer.early_stopping is not None or recipe.trainer.evaluate_every != 1:
        raise SystemExit("all trainings need whole curves: set evaluate_every to 1, and no early_stopping, in trainer")
    with importable(recipe.root):
        space = space_of(recipe)
        drawn = {_name(one): one for one in draw(recipe, space, arguments)}
        points = _points(list(drawn), _origin(recipe, space), arguments)
    kept = arguments.out.with_suffix(".jsonl")
    missing = Rows(kept, trusted=arguments.trust_rows).missing(points, arguments.shard)[: arguments.limit]
    limits = Limits(jobs=arguments.jobs, timeout=arguments.timeout, seconds=arguments.seconds, preload=_PRELOAD)
    work = partial(train_point, recipe, {name: one.to_json() for name, one in drawn.items()})
    failures = [] if arguments.known_only else compute(work, [missing], kept, limits, shown=_shown)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    written = _write(arguments, recipe, space, points, Rows(kept, trusted=arguments.trust_rows))
    return 0 if written and not failures else 1


def draw(recipe: Recipe, space: DesignedSpace, arguments: argparse.Namespace) -> list[Architecture]:
    """Draw architectures that differ, evenly over the logarithm of their operations, in a random order."""
    data, task = build_data(recipe.data, root=recipe.root), build_task(recipe.task, root=recipe.root)
    args, kwargs = task.inputs(next(data.train.batches(1)))
    costs = CostCounter(space, args, kwargs)
    generator = torch.Generator().manual_seed(arguments.draw)
    low, high = map(math.log, arguments.macs)
    drawn = sample_balanced(
        space, lambda one: math.log(costs.macs(one)), generator, count=arguments.architectures, low=low, high=high
    )
    return [drawn[place] for place in torch.randperm(len(drawn), generator=generator).tolist()]


def _name(architecture: Architecture) -> str:
    return fingerprint_of(architecture.to_json())[:_ID_LENGTH]


def _points(names: Sequence[str], origin: str, arguments: argparse.Namespace) -> list[Point]:
    """Return the trainings in the order of their worth: one of each architecture, then further seeds of the first."""
    seeded = [(name, SCORED_SEED) for name in names]
    seeded += [(name, seed) for seed in range(1, arguments.seeds) for name in names[: arguments.repeated]]
    return [{"architecture": name, "seed": seed, "of": origin} for name, seed in seeded]


def _origin(recipe: Recipe, space: DesignedSpace) -> str:
    parts = {type(part).__module__ for part in space.module.modules()}
    definitions = [sys.modules[name] for name in sorted(parts) if not name.startswith("torch.")]
    sources = [inspect.getsource(module) for module in (*definitions, architectures)]
    return origin_of(recipe, Path(architecture_points.__file__), *sources, code=_CODE)


def _shown(result: Result) -> str:
    quality = "collapsed" if result["quality"] is None else f"val {result['quality']:.4f}"
    seconds = math.fsum(epoch["training"]["cpu_seconds"] for epoch in result["epochs"])
    return f"{quality}, {result['macs']:,} operations, {seconds:.0f} s of processor time to train"


def _write(
    arguments: argparse.Namespace, recipe: Recipe, space: DesignedSpace, points: Sequence[Point], rows: Rows
) -> bool:
    """Write table and card of what is there; return whether anything is."""
    kept = arguments.out.with_suffix(".jsonl")
    if stale := rows.stale(points):
        print(f"{stale} rows of {kept} are of other code or settings and are left out", file=sys.stderr)
    known = [(point, result) for point in points if (result := rows.result(point)) is not None]
    if not known:
        print(f"no row of {kept} is of these architectures, code and settings: nothing is written", file=sys.stderr)
        return False
    making = Making(
        recipe=recipe,
        recipe_file=str(arguments.recipe),
        overrides=arguments.set,
        task=build_task(recipe.task, root=recipe.root),
        architectures=arguments.architectures,
        repeated=arguments.repeated,
        macs=tuple(arguments.macs),
        draw=arguments.draw,
        machines=rows.computed_on(points),
        trainings=len(points),
    )
    decisions = [decision.name for decision in space.decisions]
    write_text(arguments.out, table(known, decisions, recipe.trainer.epochs))
    write_text(arguments.out.with_suffix(".md"), card(known, making, arguments.out.name))
    print(f"{len(known)} of {len(points)} trainings are in {arguments.out}", file=sys.stderr)
    return True


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="its model is the space")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--out", type=Path, default=Path("docs/results/architectures.csv"), help="the table")
    parser.add_argument("--architectures", type=_at_least_one, default=120)
    parser.add_argument("--repeated", type=_at_least_one, default=30, help="architectures that get all seeds")
    parser.add_argument("--seeds", type=_at_least_one, default=3)
    parser.add_argument("--macs", nargs=2, type=float, default=[7e4, 2e6], metavar=("LOW", "HIGH"), help="operations")
    parser.add_argument("--draw", type=int, default=0, metavar="SEED", help="of the architectures that are drawn")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="every N-th training from the I-th")
    parser.add_argument("--limit", type=_at_least_one, help="train at most so many now")
    parser.add_argument("--jobs", type=_at_least_one, default=1, help="trainings at a time, each on one thread")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one training")
    parser.add_argument("--seconds", type=float, help="end after so many: what is there by then makes the table")
    parser.add_argument("--known-only", action="store_true", help="train nothing: the table of what is there")
    parser.add_argument("--trust-rows", action="store_true", help="take rows of other code and settings too")
    arguments = parser.parse_args(words)
    if not 0 < arguments.macs[0] < arguments.macs[1]:
        parser.error("--macs takes two numbers above 0, the smaller one first")
    return arguments


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1, not {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
