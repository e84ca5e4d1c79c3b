"""Do gradients find better cells than chance does at equal cost? Same space, same training, paired seeds.

For each seed the recipe's differentiable searches give an architecture each, which the stage `tune` trains. Random
search draws architectures of the same form (an operator that passes something on for each of the strongest edges into a
node), trains each for a few epochs and lets `tune` train the best on val. It ends when it has cost what the search
`darts` has: multiply-accumulates of what is trained, times the samples that pass through it. Each result is scored on
the test split. Points that were computed are kept beside the page, so that an interrupted comparison goes on.

    python -m scripts.compare_searches recipes/nas/darts_cell.yaml --out docs/results/cells.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mil_cli.events import SilentProgress
from mil_cli.models.user_code import importable
from mil_cli.recipe.load import load_recipe
from mil_cli.recipe.schema import Recipe
from mil_cli.run.cache import Cache
from mil_cli.run.runner import run_chain
from mil_cli.run.surroundings import build_surroundings
from mil_cli.spaces import Architecture, DesignedSpace
from mil_cli.stages.context import Context
from mil_cli.stages.judging import quality_or_worst
from mil_cli.stages.nas.relaxed import RelaxedConfig
from mil_cli.stages.nas.strengths import derive, operator_decisions
from mil_cli.stages.surroundings import Surroundings
from mil_cli.training.evaluate import evaluate
from scripts.comparison import Point, Result, Rows, carry_out, origin_of, parser_of, point_of, table

RANDOM = "random"
DIFFERENTIABLE = ("darts", "fair", "pc_darts")
"""The keys of the recipe's stages."""

METHODS = (RANDOM, *DIFFERENTIABLE)
TUNE = "tune"


def main(words: Sequence[str] | None = None) -> int:
    """Compute the missing points and write the page; return 1 if a point failed."""
    parser = parser_of(__doc__, methods=METHODS, out=Path("docs/results/cells.md"))
    parser.add_argument("--epochs", type=int, default=2, help="of each architecture that random search judges")
    arguments = parser.parse_args(words)
    origins = {
        method: origin_of(
            _recipe(arguments.recipe, arguments.set, method), Path(__file__), *[arguments.epochs] * (method == RANDOM)
        )
        for method in arguments.methods
    }
    phases = [[point_of(origins, method, {}, seed) for method in arguments.methods for seed in arguments.seeds]]
    return carry_out(arguments, partial(_run, arguments.epochs), phases, partial(_page, arguments, origins))


def _recipe(file: Path, overrides: Sequence[str], method: str) -> Recipe:
    """Return the recipe whose chain is one search; that of `darts` for random search, whose settings rest on it."""
    chain = DIFFERENTIABLE[0] if method == RANDOM else method
    return load_recipe(file, [f"chain=[{chain}]", "goals={}", *overrides])


def _run(epochs: int, file: Path, overrides: Sequence[str], location: Path, point: Point) -> Result:
    """Return a point's quality on test, its multiply-accumulates, and how many architectures were trained for it."""
    recipe = _recipe(file, [*overrides, f"seed={point['seed']}"], point["method"])
    with importable(recipe.root):
        around, progress, tried = build_surroundings(recipe), SilentProgress(), 1
        if point["method"] == RANDOM:
            model, tried = _random_search(recipe, around, epochs)
        else:
            cache = Cache(location, progress)
            model = run_chain(recipe, around, cache=cache, fresh=False, progress=progress).final.load()
        quality = evaluate(model, task=around.task, split=around.data.test, split_name="test").value
        return {"quality": quality, "macs": model.macs(), "tried": tried}


def _random_search(recipe: Recipe, around: Surroundings, epochs: int) -> tuple[Any, int]:
    """Return the best of some architectures by a short training, trained in full, and how many there were."""
    context = Context(name=RANDOM, surroundings=around, progress=SilentProgress())
    config = recipe.stages[DIFFERENTIABLE[0]]
    if not isinstance(config, RelaxedConfig):
        raise TypeError(f"the recipe's stage {DIFFERENTIABLE[0]} is {config.key()}")
    space, generator = context.space(), context.generator("architectures")
    args, _ = around.task.inputs(next(iter(around.data.train.batches(1))))
    left = context.trainer(config.trainer).epochs * _mixture_macs(space, args)
    best, tried = None, 0
    while left > 0:
        model = context.capture(space.build(_drawn(space, config.edges, generator), seed=context.seed))
        judged = context.finetune(model, stage=TUNE, name=f"candidate-{tried}", trainer={"epochs": epochs})
        quality = quality_or_worst(judged, context, samples=len(around.data.val))
        worth = quality if around.task.higher_is_better else -quality
        if best is None or worth > best[0]:
            best = worth, model
        left -= epochs * model.macs()
        tried += 1
    if best is None:
        raise RuntimeError("a search of no cost leaves nothing to compare")
    return context.finetune(best[1], stage=TUNE, name="winner", trainer=config.recover_trainer), tried


def _drawn(space: DesignedSpace, edges: int | None, generator: torch.Generator) -> Architecture:
    """Return an architecture of the form that differentiable searches give, drawn evenly."""
    weights = {one.name: torch.rand(len(one.choices), generator=generator) for one in operator_decisions(space)}
    return derive(space, weights, edges=edges)


def _mixture_macs(space: DesignedSpace, args: Sequence[Any]) -> int:
    """Return the multiply-accumulates of a sample that passes through all operators."""
    weights = {one.name: torch.ones(len(one.choices)) for one in operator_decisions(space)}
    space.module.eval()
    with space.mixed(weights), torch.no_grad(), FlopCounterMode(display=False) as counter:
        space.module(*args)
    return int(counter.get_total_flops()) // 2


def _page(arguments: argparse.Namespace, origins: Mapping[str, str], rows: Rows) -> list[str]:
    """Return the page's lines: errors beside those of random search, and what the architectures cost."""
    methods, seeds = arguments.methods, arguments.seeds

    def found(method: str, seed: int) -> Result | None:
        return rows.result(point_of(origins, method, {}, seed))

    def error(method: str, column: Mapping[str, Any], seed: int) -> float | None:
        result = found(method, seed)
        return None if result is None else 100 * (1 - float(result["quality"]))

    computed = "; ".join(
        rows.computed_on([point_of(origins, method, {}, seed) for method in methods for seed in seeds])
    )
    lines = [
        "# Differentiable searches beside random search at equal cost",
        "",
        f"`{arguments.recipe}`; seeds {', '.join(map(str, seeds))}; {computed}.",
        f"`{RANDOM}`: architectures of the same form, each trained for {arguments.epochs} epochs, until their training",
        "cost what the search `darts` cost; the best on val was trained in full. Beside each mean the 95 % interval of",
        f"the difference to `{RANDOM}`, paired over seeds (below 0: better).",
        "",
        *table(methods, {"test error": {}}, seeds, error, reference=[RANDOM]),
        "",
        "| method | macs of the nets found | nets trained |",
        "|---|---|---|",
    ]
    for method in methods:
        known = [one for seed in seeds if (one := found(method, seed)) is not None]
        macs, tried = (statistics.mean(one[key] for one in known) if known else None for key in ("macs", "tried"))
        lines.append(f"| `{method}` | " + ("- | - |" if macs is None else f"{macs:,.0f} | {tried:.1f} |"))
    return lines


if __name__ == "__main__":
    sys.exit(main())
