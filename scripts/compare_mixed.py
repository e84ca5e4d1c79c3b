"""Are bits chosen by layer better than one width for all weights, in as many bits? Same checkpoint, paired seeds.

For each seed the recipe's uncompressed model gets weights of one width (first and last layers have 8 bits), and then
widths by layer whose mean over all weights is at most the same, by each way to say what fewer bits cost. Widths are
those that files pack, so that files are no larger either. Each result is scored on the test split, and by its loss on
the whole of val: the choice between the ways rests on val alone. Points that were computed are kept beside the page, so
that an interrupted comparison goes on.

    python -m scripts.compare_mixed recipes/fashion_mnist/quantize_methods.yaml --out docs/results/mixed_resnet.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mil_cli.events import SilentProgress
from mil_cli.models.user_code import importable
from mil_cli.recipe.load import load_recipe
from mil_cli.recipe.schema import Recipe
from mil_cli.run.cache import Cache
from mil_cli.run.runner import Chain, run_chain
from mil_cli.run.surroundings import build_surroundings
from mil_cli.stages.context import Context
from mil_cli.stages.judging import mean_loss
from mil_cli.training.evaluate import evaluate
from scripts.comparison import Point, Result, Rows, carry_out, origin_of, parser_of, point_of, table

ORIGINAL = "original"
"""What stands for the method of the uncompressed model's own point."""

UNIFORM = "uniform"
SENSITIVITIES = ("outputs", "loss", "hessian")
METHODS = (UNIFORM, *SENSITIVITIES)
WIDTHS = (2, 3, 4, 8)
_ROUNDING = 1e-9
_COSTS = ("average_bits", "seconds")


def main(words: Sequence[str] | None = None) -> int:
    """Compute the missing points and write the page; return 1 if a point failed."""
    parser = parser_of(__doc__, methods=METHODS, out=Path("docs/results/mixed.md"))
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 4], choices=WIDTHS, help="one width for all")
    arguments = parser.parse_args(words)
    origins = {
        method: origin_of(_recipe(arguments.recipe, arguments.set, method), Path(__file__))
        for method in (ORIGINAL, *arguments.methods)
    }
    phases = [
        [point_of(origins, ORIGINAL, {}, seed) for seed in arguments.seeds],
        *(
            [
                point_of(origins, method, {"bits": bits}, seed)
                for method in arguments.methods
                for seed in arguments.seeds
            ]
            for bits in arguments.bits
        ),
    ]
    return carry_out(arguments, _run, phases, partial(_page, arguments, origins))


def _recipe(
    file: Path, overrides: Sequence[str], method: str, *, widths: Sequence[int] = WIDTHS, mean: float = 8.0
) -> Recipe:
    """Return the recipe whose weights get such widths by a method; for the uncompressed model, one without stages."""
    if method == ORIGINAL:
        return load_recipe(file, overrides).model_copy(update={"chain": ()})
    own = [f"stages.quantize.bits={list(widths)}", f"stages.quantize.average_bits={mean!r}"]
    if method != UNIFORM:
        own.append(f"stages.quantize.sensitivity={method}")
    return load_recipe(file, [*own, *overrides])


def _run(file: Path, overrides: Sequence[str], location: Path, point: Point) -> Result:
    """Return a point's quality on test and loss on val, and the mean of bits and seconds of its quantization."""
    method, seeded = point["method"], [*overrides, f"seed={point['seed']}"]
    recipe = _recipe(file, seeded, UNIFORM if "bits" in point else ORIGINAL, widths=[point.get("bits", 8)])
    with importable(recipe.root):
        chain = _chain(recipe, location)
        if method not in (ORIGINAL, UNIFORM):
            mean = (1 + _ROUNDING) * chain.results[-1].facts["notes"]["average_bits"]
            chain = _chain(_recipe(file, seeded, method, mean=mean), location)
        model, around = chain.final.load(), chain.surroundings
        context = Context(name="quantize", surroundings=around, progress=SilentProgress())
        figures = {
            "quality": evaluate(model, task=around.task, split=around.data.test, split_name="test").value,
            "loss": mean_loss(model, context, samples=len(around.data.val)),
        }
        if method == ORIGINAL:
            return figures
        facts = chain.results[-1].facts
        return {**figures, "average_bits": facts["notes"]["average_bits"], "seconds": facts["seconds"]}


def _chain(recipe: Recipe, location: Path) -> Chain:
    progress = SilentProgress()
    cache = Cache(location, progress)
    return run_chain(recipe, build_surroundings(recipe), cache=cache, fresh=False, progress=progress)


def _page(arguments: argparse.Namespace, origins: Mapping[str, str], rows: Rows) -> list[str]:
    """Return the page's lines: errors and losses beside those of one width, and what is in the files."""
    columns = {f"{bits} bits": {"bits": bits} for bits in arguments.bits}

    def found(method: str, column: Mapping[str, Any], seed: int) -> Result | None:
        return rows.result(point_of(origins, method, column, seed))

    def error(method: str, column: Mapping[str, Any], seed: int) -> float | None:
        result = found(method, column, seed)
        return None if result is None else 100 * (1 - float(result["quality"]))

    def rise(method: str, column: Mapping[str, Any], seed: int) -> float | None:
        result, original = found(method, column, seed), found(ORIGINAL, {}, seed)
        return None if result is None or original is None else 100 * (result["loss"] / original["loss"] - 1)

    originals = [one for seed in arguments.seeds if (one := found(ORIGINAL, {}, seed)) is not None]
    methods, seeds = arguments.methods, ", ".join(map(str, arguments.seeds))
    points = [
        point_of(origins, method, column, seed)
        for method in methods
        for column in columns.values()
        for seed in arguments.seeds
    ]
    computed = "; ".join(rows.computed_on(points))
    lines = ["# Bits by layer beside one width for all", "", f"`{arguments.recipe}`; seeds {seeds}; {computed}."]
    if originals:
        mean = statistics.mean(100 * (1 - float(one["quality"])) for one in originals)
        loss = statistics.mean(float(one["loss"]) for one in originals)
        lines.append(f"Uncompressed: {mean:.2f} % test error, loss {loss:.4f} on val, mean of {len(originals)} seeds.")
    lines += [
        "`uniform`: all weights in as many bits, first and last layers in 8; the others: widths chosen",
        f"among {', '.join(map(str, WIDTHS))} by what fewer bits cost, with at most the mean that `uniform` has.",
        "Activations have 8 bits. Beside each mean the 95 % interval of the difference to `uniform`, paired over seeds",
        "(below 0: better).",
        "",
        "## Test error",
        "",
        *table(methods, columns, arguments.seeds, error, reference=[UNIFORM]),
        "",
        "## Rise of the loss on val over that of the uncompressed model",
        "",
        *table(methods, columns, arguments.seeds, rise, reference=[UNIFORM]),
        "",
        "## Mean of bits, seconds of work",
        "",
        "| method | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for method in methods:
        cells = []
        for column in columns.values():
            known = [one for seed in arguments.seeds if (one := found(method, column, seed)) is not None]
            means = [statistics.mean(one[key] for one in known) for key in _COSTS if known]
            cells.append("{:.3f}, {:.0f}".format(*means) if means else "-")
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
