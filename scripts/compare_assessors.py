"""Which way to judge architectures ranks those of a data set best, and how much faster than training all of them?

The truth is the quality of one whole training of each architecture, as `scripts.build_architecture_dataset` has them;
the ceiling is how well trainings of another seed rank them. Judged are sizes, scores of first weights, curves after a
few epochs (all in the table), a few steps of training and supernets (computed here, once, each in a process of its
own), and predictors that learn from a few whole trainings, which are judged on the others alone, over many draws of the
few. Every second of processor time that a way needs is counted. Points that were computed are kept beside the page.

    python -m scripts.compare_assessors scripts/small_nets.yaml --table docs/results/architectures.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mil_cli.files import write_text
from mil_cli.models.source import build_module
from mil_cli.models.user_code import importable
from mil_cli.recipe.load import load_recipe
from mil_cli.recipe.schema import Recipe
from mil_cli.spaces import DesignedSpace
from scripts.architecture_data import Architectures
from scripts.assessment_page import figures_of, page
from scripts.assessment_picture import picture
from scripts.assessors import ASSESSORS, assess
from scripts.comparison import Point, Result, Rows, carry_out, origin_of, parser_of, point_of

_CLASSES = 10
"""Of Fashion-MNIST: guessing reaches one over it."""


def main(words: Sequence[str] | None = None) -> int:
    """Compute the missing points and write the page; return 1 if a point failed."""
    parser = parser_of(__doc__, methods=tuple(ASSESSORS), out=Path("docs/results/assessment.md"))
    parser.set_defaults(seeds=[0])
    parser.add_argument("--table", type=Path, default=Path("docs/results/architectures.csv"), help="the data set")
    arguments = parser.parse_args(words)
    recipe = load_recipe(arguments.recipe, arguments.set)
    origin = origin_of(recipe, Path(assess.__code__.co_filename), code=("stages", "training", "spaces"))
    origins = dict.fromkeys(arguments.methods, origin)
    phases = [[point_of(origins, method, {}, seed) for method in arguments.methods] for seed in arguments.seeds]
    return carry_out(arguments, partial(_run, arguments.table), phases, partial(_page, arguments, phases))


def _run(table: Path, file: Path, overrides: Sequence[str], location: Path, point: Point) -> Result:
    recipe = load_recipe(file, overrides)
    return assess(recipe, _data(recipe, table).choices, point)


def _data(recipe: Recipe, table: Path) -> Architectures:
    with importable(recipe.root):
        return Architectures.read(table, DesignedSpace(build_module(recipe.model, root=recipe.root, seed=0)))


def _page(arguments: argparse.Namespace, phases: Sequence[Sequence[Point]], rows: Rows) -> list[str]:
    recipe = load_recipe(arguments.recipe, arguments.set)
    points = [point for phase in phases for point in phase]
    known = {point["method"]: result for point in phases[0] if (result := rows.result(point)) is not None}
    head = [f"`{arguments.recipe}`, `{arguments.table}`; {'; '.join(rows.computed_on(points))}."]
    data = _data(recipe, arguments.table)
    ways, figures = figures_of(data, known)
    write_text(arguments.out.with_suffix(".svg"), picture(figures))
    return page(data, ways, figures, head=head, classes=_CLASSES)


if __name__ == "__main__":
    sys.exit(main())
