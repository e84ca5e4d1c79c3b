"""Are our pruning methods as good as Torch-Pruning's? Same checkpoint, same operations, same fine-tuning, paired seeds.

For each seed the recipe's uncompressed model is cut to each share of its operations by each method, fine-tuned by the
recipe's stage `tune`, and scored on the test split. Torch-Pruning (``pip install torch-pruning==1.6.1``) runs on the
user's module with the same weights; its cut module is captured again and fine-tuned by the same stage. Points that were
computed are kept beside the table, so that an interrupted comparison goes on.

    python -m scripts.compare_pruning recipes/fashion_mnist/prune_methods.yaml --jobs 2
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mil_cli.events import Progress, SilentProgress
from mil_cli.graph.model import Model
from mil_cli.models.source import build_module
from mil_cli.models.user_code import importable
from mil_cli.recipe.load import load_recipe
from mil_cli.recipe.schema import Recipe
from mil_cli.run.cache import Cache
from mil_cli.run.runner import Chain, run_chain
from mil_cli.run.surroundings import build_surroundings
from mil_cli.stages.context import Context
from mil_cli.training.evaluate import evaluate
from scripts.comparison import Point, Result, Rows, carry_out, origin_of, parser_of, point_of, table

QUICK = ("magnitude", "taylor", "fpgm", "hrank", "activation", "bn_scale", "random")
SEARCHES = ("sensitivity", "netadapt")
"""These try many cuts for each model, and come last."""

PEERS = ("tp_magnitude", "tp_taylor", "tp_bn_scale")
METHODS = (*QUICK, *PEERS, *SEARCHES)
ORIGINAL = "original"
"""What stands for the method of the uncompressed model's own point."""

PEER_VERSION = "1.6.1"
BISECTIONS = 10
"""After these, ratios differ by less than one channel of a network of a thousand."""


def main(words: Sequence[str] | None = None) -> int:
    """Compute the missing points and write the table; return 1 if a point failed."""
    parser = parser_of(__doc__, methods=METHODS, out=Path("docs/results/pruning.md"))
    parser.add_argument("--macs", nargs="+", type=float, default=[0.5, 0.25, 0.125], help="shares that are kept")
    arguments = parser.parse_args(words)
    origins = {method: _origin(arguments.recipe, arguments.set, method) for method in (ORIGINAL, *arguments.methods)}
    phases = [
        [point_of(origins, ORIGINAL, {}, seed) for seed in arguments.seeds],
        [
            point_of(origins, method, {"macs": macs}, seed)
            for seed in arguments.seeds
            for method in arguments.methods
            for macs in arguments.macs
        ],
    ]
    return carry_out(
        arguments,
        _run,
        phases,
        partial(_page, arguments, origins),
        preload=("scipy.optimize",),
    )


def _recipe(file: Path, overrides: Sequence[str], method: str) -> Recipe:
    """Return the recipe whose chain is that of a method; for a peer, one that only makes the uncompressed model."""
    if method not in (ORIGINAL, *PEERS):
        return load_recipe(file, [f"stage/prune@stages.prune={method}", *overrides])
    return load_recipe(file, overrides).model_copy(update={"chain": ()})


def _origin(file: Path, overrides: Sequence[str], method: str) -> str:
    recipe = _recipe(file, overrides, method)
    if method not in PEERS:
        return origin_of(recipe, Path(__file__))
    tune = recipe.stages["tune"].model_dump(mode="json")
    return origin_of(recipe, Path(__file__), method, tune, PEER_VERSION)


def _run(file: Path, overrides: Sequence[str], location: Path, point: Point) -> Result:
    """Return a point's quality on test, and the share of operations that its model keeps."""
    macs = [f"stages.prune.macs={point['macs']}"] if "macs" in point else []
    recipe = _recipe(file, [*overrides, f"seed={point['seed']}", *macs], point["method"])
    progress = SilentProgress()
    with importable(recipe.root):
        surroundings = build_surroundings(recipe)
        cache = Cache(location, progress)
        chain = run_chain(recipe, surroundings, cache=cache, fresh=False, progress=progress)
        final = _peer(recipe, chain, point, progress) if point["method"] in PEERS else chain.final.load()
        quality = evaluate(final, task=surroundings.task, split=surroundings.data.test, split_name="test").value
    return {"quality": quality, "share": final.macs() / chain.original.load().macs()}


def _peer(recipe: Recipe, chain: Chain, point: Point, progress: Progress) -> Model:
    """Cut by Torch-Pruning to at most the share of operations, and fine-tune by the recipe's stage."""
    original = chain.original.load()
    module: nn.Module = build_module(recipe.model, root=recipe.root, seed=recipe.seed)
    module.load_state_dict(original.state_dict())
    context = Context(
        name="compare", surroundings=replace(chain.surroundings, original=chain.original), progress=progress
    )
    target = point["macs"] * original.macs()
    low, high = 0.0, 0.95
    best: Model | None = None
    for _ in range(BISECTIONS):  # the ratio of channels that gives the share of operations
        ratio = (low + high) / 2
        cut = _cut_by_peer(module, original, ratio, point["method"], context)
        if cut.macs() <= target:
            best, high = cut, ratio
        else:
            low = ratio
    if best is None:
        raise SystemExit(f"{point['method']} does not reach {point['macs']} of the operations")
    return context.finetune(best, stage="tune", name=f"{point['method']}-{point['macs']}")


def _cut_by_peer(module: nn.Module, original: Model, ratio: float, method: str, context: Context) -> Model:
    import torch_pruning as tp

    net = copy.deepcopy(module).eval()
    images = original.samples[0][0]
    importance: Callable[..., Any] = {
        "tp_magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "tp_taylor": lambda: tp.importance.GroupTaylorImportance(),
        "tp_bn_scale": lambda: tp.importance.BNScaleImportance(),
    }[method]()
    pruner = tp.pruner.BasePruner(
        net,
        images,
        importance=importance,
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.95,
        ignored_layers=[layer for layer in net.modules() if isinstance(layer, nn.Linear) and layer.out_features == 10],
    )
    if method == "tp_taylor":
        for batch in context.calibration_batches(samples=1024, batch_size=128):
            args, kwargs = context.task.inputs(batch)
            context.task.loss(net(*args, **kwargs), batch).backward()
    pruner.step()
    for parameter in net.parameters():
        parameter.grad = None
    return Model.capture(net.eval(), original.samples[0])


def _page(arguments: argparse.Namespace, origins: Mapping[str, str], rows: Rows) -> list[str]:
    """Return the page's lines: mean relative drops, and paired differences to the best of Torch-Pruning."""
    columns = {f"{1 / macs:.3g}x fewer operations": {"macs": macs} for macs in arguments.macs}

    def drop(method: str, column: Mapping[str, Any], seed: int) -> float | None:
        original = rows.result(point_of(origins, ORIGINAL, {}, seed))
        found = rows.result(point_of(origins, method, column, seed))
        if original is None or found is None:
            return None
        return 100 * float((original["quality"] - found["quality"]) / original["quality"])

    points = [
        point_of(origins, method, column, seed)
        for method in arguments.methods
        for column in columns.values()
        for seed in arguments.seeds
    ]
    computed = "; ".join([f"Torch-Pruning {PEER_VERSION}", *rows.computed_on(points)])
    overrides = f" with `{' '.join(arguments.set)}`" if arguments.set else ""
    peers = [method for method in arguments.methods if method in PEERS]
    return [
        "# Pruning methods compared",
        "",
        f"`{arguments.recipe}`{overrides}; seeds {', '.join(map(str, arguments.seeds))}; {computed}.",
        "Drop: relative loss of test quality against the uncompressed model of the same seed, mean over the seeds;",
        "beside it the 95 % interval of the difference to Torch-Pruning's best, paired over seeds (below 0: better).",
        "",
        *table(arguments.methods, columns, arguments.seeds, drop, reference=peers),
    ]


if __name__ == "__main__":
    sys.exit(main())
