"""Are our quantizers as good as others? Same checkpoint, same calibration samples, same bits, paired seeds.

For each seed the recipe's uncompressed model is quantized to each setting by our methods and by the peers of
`scripts.quantization_peers`, each of which is optional: what is not installed is named on the page. Each result is
scored on the test split, as ONNX file where there is one, whose bytes and latency are taken too. Methods that train
with quantizers in place do so by the recipe's stage `tune`. Points that were computed are kept beside the page, so that
an interrupted comparison goes on.

    python -m scripts.compare_quantization recipes/fashion_mnist/quantize_methods.yaml --jobs 2
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from mil_cli.events import SilentProgress
from mil_cli.export.onnx import export_onnx
from mil_cli.export.session import OnnxModel, feeds_of
from mil_cli.graph.model import Model
from mil_cli.measure.latency import measure_latency
from mil_cli.measure.size import size_bytes
from mil_cli.models.source import build_module
from mil_cli.models.user_code import importable
from mil_cli.recipe.load import load_recipe
from mil_cli.recipe.schema import Recipe
from mil_cli.run.cache import Cache
from mil_cli.run.runner import Chain, run_chain
from mil_cli.run.surroundings import build_surroundings
from mil_cli.stages.context import Context
from mil_cli.stages.surroundings import Surroundings
from mil_cli.training.evaluate import evaluate
from scripts import quantization_peers
from scripts.comparison import Point, Result, Rows, carry_out, origin_of, parser_of, point_of, table
from scripts.quantization_peers import PEERS, Bits, Material, Predict, for_rounding

ORIGINAL = "original"
"""What stands for the method of the uncompressed model's own point."""

POST_TRAINING = ("static", "gptq", "adaround", "brecq")
LEARNING = ("adaround", "brecq")
"""Those that learn how to round, from no more samples than all the others see."""

AWARE = ("lsq", "lsq_plus", "pact", "dorefa", "apot")
METHODS = (*POST_TRAINING, *PEERS, *AWARE)

SETTINGS = {
    "W8A8": Bits(8, 8),
    "W4A8": Bits(4, 8),
    "W4A4": Bits(4, 4),
    "W3A3": Bits(3, 3),
    "W2A4": Bits(2, 4),
    "W2A2": Bits(2, 2),
}

CALIBRATION_SAMPLES = 512
CALIBRATION_BATCH = 64
"""What peers are given: the samples that our stages take by default."""


def main(words: Sequence[str] | None = None) -> int:
    """Compute the missing points and write the page; return 1 if a point failed."""
    parser = parser_of(__doc__, methods=METHODS, out=Path("docs/results/quantization.md"))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="bits")
    parser.add_argument("--aware-seeds", nargs="+", type=int, default=[0], help="seeds of methods that train")
    arguments = parser.parse_args(words)
    origins = {method: _origin(arguments.recipe, arguments.set, method) for method in (ORIGINAL, *arguments.methods)}
    groups = ((arguments.seeds, _chosen(arguments, post=True)), (arguments.aware_seeds, _chosen(arguments, post=False)))
    seeds = sorted({seed for group, methods in groups if methods for seed in group})
    phases = [
        [point_of(origins, ORIGINAL, {}, seed) for seed in seeds],
        *(
            [
                point_of(origins, method, {"bits": bits}, seed)
                for seed in group
                for method in methods
                if method not in PEERS or PEERS[method].gap() is None or arguments.known_only
                for bits in arguments.settings
                if _offers(method, SETTINGS[bits])
            ]
            for group, methods in groups
        ),
    ]
    return carry_out(arguments, _run, phases, partial(_page, arguments, origins))


def _chosen(arguments: argparse.Namespace, *, post: bool) -> list[str]:
    return [method for method in arguments.methods if (method not in AWARE) == post]


def _offers(method: str, bits: Bits) -> bool:
    """Whether a method has some bits; 2-bit activations are for those that train."""
    return PEERS[method].offers(bits) if method in PEERS else method in AWARE or for_rounding(bits)


def _recipe(file: Path, overrides: Sequence[str], method: str, bits: Bits | None = None) -> Recipe:
    """Return the recipe whose chain is that of a method; for a peer, one that only makes the uncompressed model."""
    if method == ORIGINAL or method in PEERS:
        return load_recipe(file, overrides).model_copy(update={"chain": ()})
    widths = {} if bits is None else {"weight_bits": bits.weights, "activation_bits": bits.activations}
    own = [
        f"stage/quantize@stages.quantize={method}",
        *(f"stages.quantize.{key}={width}" for key, width in widths.items()),
        *(["stages.quantize.distill=tune"] if method in AWARE else []),
        *([f"stages.quantize.samples={CALIBRATION_SAMPLES}"] if method in LEARNING else []),
    ]
    return load_recipe(file, [*own, *overrides])


def _origin(file: Path, overrides: Sequence[str], method: str) -> str:
    recipe = _recipe(file, overrides, method)
    if method not in PEERS:
        return origin_of(recipe, Path(__file__))
    code = Path(quantization_peers.__file__).read_text(encoding="utf-8")
    return origin_of(recipe, Path(__file__), method, PEERS[method].release(), code)


def _run(file: Path, overrides: Sequence[str], location: Path, point: Point) -> Result:
    """Return a point's quality on test, and the seconds, bytes and latency ratio of its quantization."""
    method = point["method"]
    bits = SETTINGS[point["bits"]] if "bits" in point else None
    recipe = _recipe(file, [*overrides, f"seed={point['seed']}"], method, bits)
    progress = SilentProgress()
    with importable(recipe.root), TemporaryDirectory(prefix="compare-") as temporary:
        folder = Path(temporary)
        surroundings = build_surroundings(recipe)
        chain = run_chain(recipe, surroundings, cache=Cache(location, progress), fresh=False, progress=progress)
        original = chain.original.load()
        baseline = export_onnx(original, folder / "baseline.onnx", device=surroundings.device).path
        if method == ORIGINAL:
            return _figures(baseline, None, original, surroundings)
        if method not in PEERS:
            exported = export_onnx(chain.final.load(), folder / "model.onnx", device=surroundings.device).path
            return {
                **_figures(exported, baseline, original, surroundings),
                "seconds": chain.results[-1].facts["seconds"],
            }
        assert bits is not None
        result, seconds = _quantized_by_peer(method, bits, _material(recipe, chain, baseline, folder))
        return {**_figures(result, baseline, original, surroundings), "seconds": seconds}


def _material(recipe: Recipe, chain: Chain, baseline: Path, folder: Path) -> Material:
    """Return what a peer is given: the user's module with the weights of the seed, and our stages' samples."""
    original = chain.original.load()
    module: nn.Module = build_module(recipe.model, root=recipe.root, seed=recipe.seed)
    module.load_state_dict(original.state_dict())
    context = Context(name="quantize", surroundings=chain.surroundings, progress=SilentProgress())
    calls = list(context.calibration(samples=CALIBRATION_SAMPLES, batch_size=CALIBRATION_BATCH))
    return Material(original, module.eval(), baseline, calls, chain.surroundings.device, folder)


def _quantized_by_peer(method: str, bits: Bits, material: Material) -> tuple[Path | Predict, float]:
    """Return what a peer made, and in how many seconds, without those of loading its package."""
    for module in PEERS[method].modules:
        importlib.import_module(module)
    start = time.monotonic()
    return PEERS[method].quantize(material, bits), time.monotonic() - start


def _figures(result: Path | Predict, baseline: Path | None, original: Model, around: Surroundings) -> Result:
    """Return the quality of a file, or of what is called as the model; of a file its bytes and latency ratio too."""
    threads = around.device.threads
    predict = OnnxModel(result, original.spec, threads=threads) if isinstance(result, Path) else result
    quality = evaluate(predict, task=around.task, split=around.data.test, split_name="test").value
    if not isinstance(result, Path):
        return {"quality": quality}
    sized = {"quality": quality, "bytes": size_bytes(result)}
    if baseline is None:
        return sized
    args, kwargs = around.task.inputs(next(iter(around.data.val.batches(1))))
    feeds = feeds_of(original.spec, args, kwargs)
    latency = measure_latency([baseline, result], device=around.device, feeds=feeds)[1]
    return {**sized, "ratio": latency.ratio_to_baseline}


def _page(arguments: argparse.Namespace, origins: Mapping[str, str], rows: Rows) -> list[str]:
    """Return the page's lines: drops beside the best peer's, and what methods and files cost."""
    columns = {bits: {"bits": bits} for bits in arguments.settings}
    post, aware = _chosen(arguments, post=True), _chosen(arguments, post=False)
    originals = {
        seed: found
        for seed in {*arguments.seeds, *arguments.aware_seeds}
        if (found := rows.result(point_of(origins, ORIGINAL, {}, seed))) is not None
    }

    def figure(key: str, method: str, column: Mapping[str, Any], seed: int) -> float | None:
        found = rows.result(point_of(origins, method, column, seed))
        return None if found is None or key not in found else float(found[key])

    def drop(method: str, column: Mapping[str, Any], seed: int) -> float | None:
        quality = figure("quality", method, column, seed)
        if quality is None or seed not in originals:
            return None
        return 100 * (originals[seed]["quality"] - quality) / float(originals[seed]["quality"])

    seeds_of = {**dict.fromkeys(post, arguments.seeds), **dict.fromkeys(aware, arguments.aware_seeds)}
    points = [
        point_of(origins, method, column, seed)
        for method, seeds in seeds_of.items()
        for column in columns.values()
        for seed in seeds
    ]
    overrides = f" with `{' '.join(arguments.set)}`" if arguments.set else ""
    computed = "; ".join(rows.computed_on(points))
    peers = [method for method in post if method in PEERS]
    lines = ["# Methods of quantization compared", "", f"`{arguments.recipe}`{overrides}; {computed}."]
    if originals:
        quality = 100 * statistics.mean(found["quality"] for found in originals.values())
        size = statistics.mean(found["bytes"] for found in originals.values()) / 1000
        lines.append(f"Uncompressed: {quality:.2f} % on test, mean of {len(originals)} seeds; a file of {size:.0f} kB.")
    lines += [
        "W4A8: weights of 4 bits, 8 for what layers read; first and last layer have 8. Methods after training see the",
        f"same {CALIBRATION_SAMPLES} samples. Drop: relative loss of test quality against the uncompressed model.",
    ]
    if post:
        lines += [
            "",
            "## After training",
            "",
            f"Drop, mean over seeds {_listed(arguments.seeds)}; beside it the 95 % interval of the difference to the",
            "best peer, paired over seeds (below 0: better).",
            "",
            *table(post, columns, arguments.seeds, drop, reference=peers),
            "",
            *(line for peer in peers for line in _about(peer, columns, arguments.seeds, drop)),
        ]
    if aware:
        lines += [
            "",
            "## Trained with quantizers in place",
            "",
            f"Drop, mean over seeds {_listed(arguments.aware_seeds)}. No peer trains here.",
            "",
            *table(aware, columns, arguments.aware_seeds, drop, reference=[]),
        ]
    forms: Mapping[str, tuple[str, Callable[[float], str]]] = {
        "bytes": ("Bytes of the file, in kB", lambda value: f"{value / 1000:.0f}"),
        "ratio": (
            "Latency of the file as a share of the uncompressed one's, one sample at a time",
            lambda value: f"{value:.2f}",
        ),
        "seconds": ("Seconds of work, on whatever else the machine did meanwhile", lambda value: f"{value:.0f}"),
    }
    for key, (heading, form) in forms.items():
        lines += ["", f"## {heading}", "", *_means(seeds_of, columns, partial(figure, key), form)]
    return lines


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _about(
    peer: str,
    columns: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    value: Callable[[str, Mapping[str, Any], int], float | None],
) -> list[str]:
    """Return what a peer is, and why it has no rows if it has none."""
    known = any(value(peer, column, seed) is not None for column in columns.values() for seed in seeds)
    gap = None if known else PEERS[peer].gap() or "not computed"
    return [f"- `{peer}`: {PEERS[peer].said} ({PEERS[peer].release()})." + (f" No rows: {gap}." if gap else "")]


def _means(
    seeds_of: Mapping[str, Sequence[int]],
    columns: Mapping[str, Mapping[str, Any]],
    value: Callable[[str, Mapping[str, Any], int], float | None],
    form: Callable[[float], str],
) -> list[str]:
    """Return a table of a figure's means over what is known, of the methods that have any."""
    lines = ["| method | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for method, seeds in seeds_of.items():
        cells = []
        for column in columns.values():
            known = [found for seed in seeds if (found := value(method, column, seed)) is not None]
            cells.append(form(statistics.mean(known)) if known else "-")
        if any(cell != "-" for cell in cells):
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
