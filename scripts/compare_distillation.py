"""What does distillation buy? Each method beside plain training of the same student, and beside torchdistill's losses.

For each seed the recipe's uncompressed model teaches the recipe's student by each method; all start from the same
weights, see the same batches and are scored on the test split. With half of some number of epochs beside it the
page tells who reaches in half the steps what plain training reaches in all. torchdistill (``pip install --no-deps
torchdistill==1.1.5``) gives the losses of the peers, which run in the same training. Points that were computed are kept
beside the page, so that an interrupted comparison goes on.

    python -m scripts.compare_distillation recipes/fashion_mnist/distill_methods.yaml --jobs 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mil_cli.events import SilentProgress
from mil_cli.graph.model import Model
from mil_cli.models.user_code import importable
from mil_cli.recipe.load import load_recipe
from mil_cli.recipe.schema import Recipe
from mil_cli.run.cache import Cache
from mil_cli.run.runner import Chain, run_chain
from mil_cli.run.surroundings import build_surroundings
from mil_cli.stages.context import Context
from mil_cli.stages.distill.distil import DistillConfig, Lesson, student_of, teach
from mil_cli.stages.distill.pairs import pair_layers
from mil_cli.training.evaluate import evaluate
from scripts.comparison import Point, Result, Rows, carry_out, origin_of, paired_interval, parser_of, point_of, table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mil_cli.data.base import Batch
    from mil_cli.training.objective import Objective

ORIGINAL = "original"
"""What stands for the method of the teacher's own point."""

PLAIN = "plain"
TEACHERS = 3
"""Teachers of an ensemble: those of the point's seed and of the next ones."""


@dataclass(frozen=True)
class Variant:
    """A line of the page.

    Attributes:
        method: The method of the family distill.
        settings: Settings of the stage.
        overrides: Other overrides of the recipe.
        epochs: What the epochs are multiplied by.
        said: What the page says of it.
    """

    method: str = "soft_labels"
    settings: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    epochs: float = 1.0
    said: str = ""


OURS = {
    PLAIN: Variant(settings=("weight=0",), said="the student alone, on the labels"),
    "soft_labels": Variant(),
    "dkd": Variant("dkd"),
    "dist": Variant("dist"),
    "function_matching": Variant("function_matching", ("longer=1",), said="no longer than the others here"),
    "hints": Variant("hints"),
    "attention_transfer": Variant("attention_transfer"),
    "relational": Variant("relational"),
    "similarity": Variant("similarity"),
    "deep_supervision": Variant("deep_supervision", said="no teacher"),
    "born_again": Variant(
        "born_again", ("generations=1",), epochs=0.5, said="no teacher; two trainings of half the epochs"
    ),
    "assistants": Variant(
        "assistants",
        ("by=thin",),
        ("+stage/prune@stages.thin=magnitude", "++stages.thin.macs=0.5", "++stages.thin.round_to=1"),
        said="one assistant; all trainings together cost what `soft_labels` costs",
    ),
    "ensemble_drawn": Variant(
        "ensemble", ("mode=one_per_batch",), said="three teachers, one at each step, so that it costs what one costs"
    ),
    "ensemble_mean": Variant("ensemble", said="three teachers, all at each step: 2.5 times the cost"),
    "ensemble_mean_equal": Variant(
        "ensemble", epochs=0.4, said="the same with 0.4 of the epochs, so that it costs what `soft_labels` costs"
    ),
}

PEER_VERSION = "1.1.5"
PEERS = {
    "td_soft_labels": "soft_labels",
    "td_dist": "dist",
    "td_attention_transfer": "attention_transfer",
    "td_relational": "relational",
    "td_similarity": "similarity",
}
"""torchdistill's losses, and our method that each is held against."""

METHODS = (*OURS, *PEERS)


def main(words: Sequence[str] | None = None) -> int:
    """Compute the missing points and write the page; return 1 if a point failed."""
    parser = parser_of(__doc__, methods=METHODS, out=Path("docs/results/distillation.md"))
    parser.add_argument("--epochs", nargs="+", type=int, default=[12, 6], help="lengths of the students' trainings")
    arguments = parser.parse_args(words)
    origins = {method: _origin(arguments.recipe, arguments.set, method) for method in (ORIGINAL, *arguments.methods)}
    several = any(OURS[method].method == "ensemble" for method in arguments.methods if method in OURS)
    teachers = sorted({seed + next_ for seed in arguments.seeds for next_ in range(TEACHERS if several else 1)})
    phases = [
        [point_of(origins, ORIGINAL, {}, seed) for seed in teachers],
        [
            point_of(origins, method, {"epochs": epochs}, seed)
            for seed in arguments.seeds
            for method in arguments.methods
            for epochs in arguments.epochs
        ],
    ]
    return carry_out(arguments, _run, phases, partial(_page, arguments, origins))


def _recipe(file: Path, overrides: Sequence[str], method: str, *, epochs: int | None = None) -> Recipe:
    """Return the recipe whose chain is that of a method; for a teacher or a peer, one that only makes the teacher."""
    variant = OURS.get(PEERS.get(method, method), Variant())
    length = [] if epochs is None else [f"stages.distil.trainer.epochs={max(round(epochs * variant.epochs), 1)}"]
    recipe = load_recipe(
        file,
        [
            f"stage/distill@stages.distil={variant.method}",
            *(f"stages.distil.{setting}" for setting in variant.settings),
            *(["stages.distil.teachers=[null,null]"] if variant.method == "ensemble" else []),
            *variant.overrides,
            *length,
            *overrides,
        ],
    )
    return recipe if method in OURS else recipe.model_copy(update={"chain": ()})


def _origin(file: Path, overrides: Sequence[str], method: str) -> str:
    recipe = _recipe(file, overrides, method)
    if method not in PEERS:
        return origin_of(recipe, Path(__file__))
    settings = recipe.stages["distil"].model_dump(mode="json")
    return origin_of(recipe, Path(__file__), method, settings, PEER_VERSION)


def _run(file: Path, overrides: Sequence[str], location: Path, point: Point) -> Result:
    """Return a point's quality on test, and the share of operations that its model keeps."""
    method, seed = point["method"], point["seed"]
    progress = SilentProgress()
    cache = Cache(location, progress)

    def chain_of(seed: int, method: str) -> tuple[Recipe, Chain]:
        recipe = _recipe(file, [*overrides, f"seed={seed}"], method, epochs=point.get("epochs"))
        if seed == point["seed"] and method in OURS and OURS[method].method == "ensemble":
            others = [_teacher_file(chain_of(seed + next_, ORIGINAL)[1]) for next_ in range(1, TEACHERS)]
            config = recipe.stages["distil"].model_copy(update={"teachers": (None, *map(str, others))})
            recipe = recipe.model_copy(update={"stages": {**recipe.stages, "distil": config}})
        surroundings = build_surroundings(recipe)
        return recipe, run_chain(recipe, surroundings, cache=cache, fresh=False, progress=progress)

    with importable(load_recipe(file, overrides).root):
        recipe, chain = chain_of(seed, method)
        final = _peer(recipe, chain, method) if method in PEERS else chain.final.load()
        around = chain.surroundings
        quality = evaluate(final, task=around.task, split=around.data.test, split_name="test").value
    return {"quality": quality, "share": final.macs() / chain.original.load().macs()}


def _teacher_file(chain: Chain) -> Path:
    if chain.preparation is None:
        raise SystemExit("an ensemble needs teachers that the recipe trains: one with a checkpoint has a single one")
    return chain.preparation.folder / "model.pt2"


def _peer(recipe: Recipe, chain: Chain, method: str) -> Model:
    """Teach the recipe's student by a loss of torchdistill, in our training."""
    context = Context(
        name="distil",
        surroundings=replace(chain.surroundings, original=chain.original),
        progress=SilentProgress(),
    )
    config = cast("DistillConfig", recipe.stages["distil"])
    teacher = chain.original.load()
    student = student_of(teacher, config, context)
    mapped = method == "td_attention_transfer"
    pairs = pair_layers(
        student, teacher, given={}, count=3 if mapped else 1, mapped=mapped, where="stages.distil.pairs"
    )
    paths = [(pair.student.path, pair.teacher.path) for pair in pairs]
    loss = _peer_loss(method, paths)
    features = method not in ("td_soft_labels", "td_dist")

    def bind(lesson: Lesson) -> Objective:
        def objective(outputs: Any, batch: Batch) -> Tensor:
            answers, values = lesson.teacher.study(batch) if features else (lesson.teacher(batch), {})
            learnt = lesson.running.tapped() if features else {}
            said = {path: {"output": value} for path, value in {**learnt, "": outputs}.items()}
            heard = {path: {"output": value} for path, value in {**values, "": answers}.items()}
            return loss(said, heard, outputs, cast("Any", batch)[1])

        return objective

    result = teach(
        student,
        [teacher],
        context,
        bind,
        settings=context.trainer(config.trainer),
        cache_gb=0,
        taps=[student_path for student_path, _ in paths] if features else (),
        teacher_taps=[teacher_path for _, teacher_path in paths] if features else (),
    )
    return result.model


def _peer_loss(method: str, paths: Sequence[tuple[str, str]]) -> Callable[..., Tensor]:
    """Return (student's values, teacher's values, outputs, labels) -> loss: torchdistill's, by its papers' weights."""
    from torch.nn import functional
    from torchdistill.losses import mid_level

    ends = {
        "student_module_path": "",
        "student_module_io": "output",
        "teacher_module_path": "",
        "teacher_module_io": "output",
    }
    last = {"student_output_path": paths[-1][0], "teacher_output_path": paths[-1][1]}
    pairs = {
        f"pair{index}": {"student": {"io": "output", "path": student}, "teacher": {"io": "output", "path": teacher}}
        for index, (student, teacher) in enumerate(paths)
    }
    made: dict[str, tuple[float, Callable[[], nn.Module]]] = {
        "td_soft_labels": (0.0, lambda: mid_level.KDLoss(**ends, temperature=4.0, alpha=0.1)),
        "td_dist": (1.0, lambda: mid_level.DISTLoss(**ends, beta=2.0, gamma=2.0)),
        "td_attention_transfer": (1.0, lambda: mid_level.ATLoss(pairs)),
        "td_relational": (
            1.0,
            lambda: mid_level.RKDLoss(**last, dist_factor=25.0, angle_factor=50.0, reduction="mean"),
        ),
        "td_similarity": (1.0, lambda: mid_level.SPKDLoss(**last, reduction="batchmean")),
    }
    labels_weight, make = made[method]
    factor = {"td_attention_transfer": 1000.0, "td_similarity": 3000.0}.get(method, 1.0)
    module = make()

    def loss(said: Any, heard: Any, outputs: Tensor, labels: Tensor) -> Tensor:
        return factor * cast("Tensor", module(said, heard, labels)) + labels_weight * functional.cross_entropy(
            outputs, labels
        )

    return loss


def _page(arguments: argparse.Namespace, origins: Mapping[str, str], rows: Rows) -> list[str]:
    """Return the page's lines: errors beside plain training, half the steps, and torchdistill's losses."""
    seeds, methods = arguments.seeds, arguments.methods
    columns = {f"{epochs} epochs": {"epochs": epochs} for epochs in arguments.epochs}

    def error(method: str, column: Mapping[str, Any], seed: int) -> float | None:
        found = rows.result(point_of(origins, method, column, seed))
        return None if found is None else 100 * (1 - float(found["quality"]))

    def pairs(one: str, other: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[float, float]]:
        found = [(error(one, ours, seed), error(other, theirs, seed)) for seed in seeds]
        return [(mine, yours) for mine, yours in found if mine is not None and yours is not None]

    points = [
        point_of(origins, method, column, seed) for method in methods for column in columns.values() for seed in seeds
    ]
    teachers = [found for seed in seeds if (found := rows.result(point_of(origins, ORIGINAL, {}, seed))) is not None]
    shares = sorted({found["share"] for point in points if (found := rows.result(point)) is not None})
    computed = "; ".join([f"torchdistill {PEER_VERSION}", *rows.computed_on(points)])
    overrides = f" with `{' '.join(arguments.set)}`" if arguments.set else ""
    lines = [
        "# Methods of distillation compared",
        "",
        f"`{arguments.recipe}`{overrides}; seeds {', '.join(map(str, seeds))}; {computed}.",
    ]
    if teachers and shares:
        mean = 100 * (1 - statistics.mean(found["quality"] for found in teachers))
        lines.append(
            f"Teachers: {mean:.2f} % test error; the student has {100 * shares[-1]:.1f} % of their operations."
        )
    lines += [
        "Test error, mean over the seeds; beside it the 95 % interval of the difference to plain training of the same",
        "student at equal steps, paired over seeds (below 0: better).",
        "",
        *table(methods, columns, seeds, error, reference=[PLAIN] if PLAIN in methods else []),
        "",
        *(f"- `{method}`: {OURS[method].said}." for method in methods if method in OURS and OURS[method].said),
    ]
    halves = [epochs for epochs in sorted(arguments.epochs) if 2 * epochs in arguments.epochs and PLAIN in methods]
    for epochs in halves:
        lines += ["", f"## {epochs} epochs of distillation against {2 * epochs} of plain training", ""]
        lines += _differences(
            (method, pairs(method, PLAIN, {"epochs": epochs}, {"epochs": 2 * epochs}))
            for method in methods
            if method != PLAIN and method not in PEERS
        )
    if any(method in PEERS for method in methods):
        lines += ["", "## Against torchdistill", ""]
        lines += ["Its losses with the weights of their papers, in the same training.", ""]
        lines += _differences(
            (f"{PEERS[peer]} against {peer}, {heading}", pairs(PEERS[peer], peer, column, column))
            for heading, column in columns.items()
            for peer in methods
            if peer in PEERS and PEERS[peer] in methods
        )
    return lines


def _differences(of: Iterable[tuple[str, Sequence[tuple[float, float]]]]) -> list[str]:
    """Return a table of named pairs: the mean difference of errors, and its interval."""
    lines = ["| | difference of test errors | 95 % interval |", "|---|---|---|"]
    for name, found in of:
        interval = paired_interval(found)
        if interval is not None:
            middle = statistics.mean(mine - other for mine, other in found)
            lines.append(f"| {name} | {middle:+.2f} | {interval[0]:+.2f} to {interval[1]:+.2f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
