"""Are our pruning methods as good as Torch-Pruning's? Same checkpoint, same operations, same fine-tuning, paired seeds.

For each seed the recipe's uncompressed model is cut to each share of its operations by each method, fine-tuned by the
recipe's stage `tune`, and scored on the test split. Torch-Pruning (``pip install torch-pruning==1.6.1``) runs on the
user's module with the same weights; its cut module is captured again and fine-tuned by the same stage. Points that were
computed are kept beside the table, so that an interrupted comparison goes on.

    python scripts/compare_pruning.py recipes/fashion_mnist/prune_methods.yaml --out docs/results/pruning.md
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import nn

from mil_cli.cli.console import messages
from mil_cli.cli.progress import progress_on
from mil_cli.graph.model import Model
from mil_cli.models.source import build_module
from mil_cli.models.user_code import importable
from mil_cli.recipe.load import load_recipe
from mil_cli.run.cache import Cache, default_location
from mil_cli.run.runner import Chain, run_chain
from mil_cli.run.surroundings import build_surroundings
from mil_cli.stages.context import Context
from mil_cli.training.evaluate import evaluate

OURS = ("magnitude", "taylor", "fpgm", "hrank", "activation", "bn_scale", "sensitivity", "random")
PEERS = ("tp_magnitude", "tp_taylor", "tp_bn_scale")
PEER_VERSION = "1.6.1"
BISECTIONS = 14

Point = dict[str, Any]


def main() -> None:
    """Run the comparison and write its table."""
    arguments = _arguments()
    kept = arguments.out.with_suffix(".jsonl")
    kept.parent.mkdir(parents=True, exist_ok=True)
    points = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for point in _missing(points, arguments):
        points.append(_run(arguments.recipe, point))
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(points[-1]) + "\n")
        print(json.dumps(points[-1]), flush=True)
    text = table(points, arguments)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


def _missing(points: Sequence[Point], arguments: argparse.Namespace) -> Iterator[Point]:
    done = {(point["method"], point["macs"], point["seed"]) for point in points}
    for seed in arguments.seeds:
        for macs in arguments.macs:
            for method in arguments.methods:
                if (method, macs, seed) not in done:
                    yield {"method": method, "macs": macs, "seed": seed}


def _run(file: Path, point: Point) -> Point:
    """Return a point with its qualities on test, its operations, and those of the uncompressed model."""
    peer = point["method"].startswith("tp_")
    overrides = [f"seed={point['seed']}", f"stages.prune.macs={point['macs']}"]
    recipe = load_recipe(file, overrides if peer else [*overrides, f"stage/prune@stages.prune={point['method']}"])
    progress = progress_on(messages())
    cache = Cache(default_location(), progress)
    with importable(recipe.root):
        surroundings = build_surroundings(recipe)
        wanted = recipe.model_copy(update={"chain": ()}) if peer else recipe
        chain = run_chain(wanted, surroundings, cache=cache, fresh=False, progress=progress)
        original = chain.original.load()
        final = _peer(recipe, chain, point, progress) if peer else chain.final.load()
        score = [
            evaluate(model, task=surroundings.task, split=surroundings.data.test, split_name="test").value
            for model in (original, final)
        ]
    return {**point, "original": score[0], "quality": score[1], "share": final.macs() / original.macs()}


def _peer(recipe: Any, chain: Chain, point: Point, progress: Any) -> Model:
    """Cut by Torch-Pruning to at most the share of operations, and fine-tune by the recipe's stage."""
    original = chain.original.load()
    module: nn.Module = build_module(recipe.model, root=recipe.root, seed=recipe.seed)
    module.load_state_dict(original.state_dict(), strict=False)
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


def table(points: Sequence[Point], arguments: argparse.Namespace) -> str:
    """Return the results as Markdown: mean relative drops, and paired differences to the best of Torch-Pruning."""
    lines = [
        "# Pruning methods compared",
        "",
        f"`{arguments.recipe}`; seeds {', '.join(map(str, arguments.seeds))}; Torch-Pruning {PEER_VERSION};"
        f" torch {torch.__version__}.",
        "Drop: relative loss of test quality against the uncompressed model of the same seed, mean over the seeds;",
        "beside it the 95 % interval of the difference to Torch-Pruning's best, paired over seeds (below 0: better).",
        "",
        "| method | " + " | ".join(f"{1 / macs:.3g}x fewer operations" for macs in arguments.macs) + " |",
        "|---|" + "---|" * len(arguments.macs),
    ]
    drops = {}
    for point in points:
        drop = 100 * (point["original"] - point["quality"]) / point["original"]
        drops[point["method"], point["macs"], point["seed"]] = drop
    for method in arguments.methods:
        cells = [_cell(drops, method, macs, arguments.seeds, arguments.methods) for macs in arguments.macs]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(
    drops: dict[tuple[str, float, int], float], method: str, macs: float, seeds: Sequence[int], methods: Sequence[str]
) -> str:
    own = [drops[method, macs, seed] for seed in seeds]
    mean = f"{statistics.mean(own):.2f} %"
    peers = [other for other in methods if other.startswith("tp_")]
    if not peers or method in peers or len(seeds) < 2:
        return mean
    best = min(peers, key=lambda other: statistics.mean(drops[other, macs, seed] for seed in seeds))
    differences = [mine - drops[best, macs, seed] for mine, seed in zip(own, seeds, strict=True)]
    half = stats.t.ppf(0.975, len(seeds) - 1) * statistics.stdev(differences) / len(seeds) ** 0.5
    middle = statistics.mean(differences)
    return f"{mean} ({middle - half:+.2f} to {middle + half:+.2f})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--methods", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--macs", nargs="+", type=float, default=[0.5, 0.25, 0.125])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/results/pruning.md"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
