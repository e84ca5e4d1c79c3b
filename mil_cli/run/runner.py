"""Runs a whole recipe: uncompressed model, chain, export, proof, goals, report; everything resumable."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mil_cli.errors import RecipeError
from mil_cli.events import Progress, SilentProgress
from mil_cli.files import finite, write_json
from mil_cli.models.user_code import importable
from mil_cli.run.cache import ENTRY, Cache, default_location
from mil_cli.run.directory import REPORT, RunDirectory
from mil_cli.run.environment import describe
from mil_cli.run.execute import CapturedModel, Executor, StageResult
from mil_cli.run.goals import check_measurable, judge, remedies, slowdowns
from mil_cli.run.opening import open_run
from mil_cli.run.processes import part, place
from mil_cli.run.prove import Proof, Prover
from mil_cli.run.surroundings import build_surroundings, source_model
from mil_cli.stages.surroundings import StoredModel, Surroundings

if TYPE_CHECKING:
    from mil_cli.recipe.schema import Recipe

REPORT_VERSION = 1


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        directory: The run's folder; the process's part of the cache in a process that only helped to train.
        report: The content of its `report.json`; empty in a process that only helped to train.
        goals_met: Whether every goal was met.
    """

    directory: Path
    report: dict[str, Any]
    goals_met: bool


@dataclass(frozen=True)
class Chain:
    """The models of a recipe's chain.

    Attributes:
        surroundings: What the stages could read.
        preparation: The stage that made the uncompressed model, if it had to be made.
        original: The uncompressed model.
        results: What each stage of the chain made, in order.
    """

    surroundings: Surroundings
    preparation: StageResult | None
    original: StoredModel
    results: list[StageResult]

    @property
    def final(self) -> StoredModel:
        """The last stage's model."""
        return self.results[-1].model if self.results else self.original


def check_chain(recipe: Recipe) -> None:
    """Refuse a recipe without a chain, which only ranks.

    Raises:
        RecipeError: It has none.
    """
    if not recipe.chain:
        hint = f"rank its architectures by: mil rank {recipe.path}; or write a chain"
        raise RecipeError("there is nothing to compress: the chain is empty", where="chain", hint=hint)


def run_chain(
    recipe: Recipe,
    surroundings: Surroundings,
    *,
    cache: Cache,
    fresh: bool,
    progress: Progress,
    on_result: Callable[[int, StageResult], None] = lambda position, result: None,
) -> Chain:
    """Make the uncompressed model and run the chain on it.

    Args:
        recipe: The recipe.
        surroundings: What its stages may read.
        cache: Where results are kept.
        fresh: Whether to compute even what is there.
        progress: Where work is reported.
        on_result: Called after each stage with its position (0 makes the uncompressed model) and result.

    Raises:
        MilError: A stage cannot do what its settings ask; what was reached stays in the cache.
    """
    original: StoredModel = CapturedModel(source_model(recipe, surroundings))
    preparation = None
    if recipe.baseline is not None and recipe.model.checkpoint is None and recipe.model.pt2 is None:
        executor = Executor(surroundings, cache, fresh, progress)
        preparation = executor.run("baseline", recipe.baseline, original)
        on_result(0, preparation)
        original = preparation.model
    surroundings = replace(surroundings, original=original)
    executor = Executor(surroundings, cache, fresh, progress)
    results: list[StageResult] = []
    model = original
    for position, name in enumerate(recipe.chain, start=1):
        result = executor.run(name, recipe.stages[name], model)
        on_result(position, result)
        results.append(result)
        model = result.model
    return Chain(surroundings, preparation, original, results)


def run_recipe(
    recipe: Recipe,
    *,
    progress: Progress,
    out: Path | None = None,
    fresh: bool = False,
    cache_location: Path | None = None,
    base: Path | None = None,
    now: Callable[[], datetime] = datetime.now,
) -> RunResult:
    """Run a recipe and write its run directory.

    Args:
        recipe: The validated recipe.
        progress: Where work is reported.
        out: The run's folder; a dated one below ``runs/`` if None.
        fresh: Compute this run's stages even if the cache has them.
        cache_location: The stage cache; ``$MIL_CACHE`` or the user's cache folder if None.
        base: Where ``runs/`` is; the present folder if None.
        now: The clock that names and dates the run.

    Raises:
        MilError: Something that the user can mend; what was reached is saved, the same command goes on.
    """
    check_chain(recipe)
    own = place()
    location = own.cache_location(cache_location or default_location())
    if not own.leads:
        with importable(recipe.root):
            quiet = SilentProgress()
            cache = Cache(location, quiet)
            run_chain(recipe, build_surroundings(recipe), cache=cache, fresh=fresh, progress=quiet)
            part()
            return RunResult(location, {}, goals_met=True)
    opened = open_run(recipe.name, recipe.resolved, progress=progress, out=out, base=base or Path.cwd(), now=now)
    with opened as (directory, log):
        cache = Cache(location, log)
        with importable(recipe.root):
            report = _run(recipe, directory, cache=cache, fresh=fresh, progress=log)
    return RunResult(directory.path, report, report["goals_met"])


def _run(recipe: Recipe, directory: RunDirectory, *, cache: Cache, fresh: bool, progress: Progress) -> dict[str, Any]:
    surroundings = build_surroundings(recipe)
    check_measurable(recipe.goals, surroundings.device, higher_is_better=surroundings.task.higher_is_better)

    def keep(position: int, result: StageResult) -> None:
        folder = f"stages/{position:02d}-{result.name}"
        _take_all(directory, result.folder, folder)
        write_json(directory.path / folder / "stage.json", _stage_entry(result, None))

    chain = run_chain(recipe, surroundings, cache=cache, fresh=fresh, progress=progress, on_result=keep)
    part()
    prover = Prover(surroundings.task, surroundings.data, surroundings.device, cache, fresh, progress)
    baseline = prover.prove("baseline", chain.original, judged=True)
    timed = _timed(chain.results, every=recipe.measure.per_stage)
    between = [
        prover.prove(result.name, result.model, judged=False) for result in map(chain.results.__getitem__, timed)
    ]
    final = prover.prove("final", chain.final, judged=True)
    directory.take(baseline.path, "baseline.onnx")
    directory.take(final.path, "model.onnx")
    _keep_final(directory, chain)
    figures = prover.measure([baseline, *between, final], recipe.measure)
    preparation = (
        _given(recipe, prover, baseline) if chain.preparation is None else _stage_entry(chain.preparation, None)
    )
    of_stages = dict(zip(timed, figures[1:-1], strict=True))
    report = _report(recipe, chain, preparation, (baseline, figures[0]), of_stages, (final, figures[-1]))
    write_json(directory.path / REPORT, report)
    return report


def _timed(results: Sequence[StageResult], *, every: bool) -> list[int]:
    """Return the places of the results before the last that are timed: those around a stage that quantizes, or all.

    What the stages before it gained must not hide that integers are slower than the float model that they came from.
    """
    quantizes = [result.config.family == "quantize" for result in results]
    return [place for place, pair in enumerate(itertools.pairwise(quantizes)) if every or any(pair)]


def _take_all(directory: RunDirectory, source: Path, folder: str) -> None:
    for file in sorted(source.iterdir()):
        if file.name != ENTRY:
            directory.take(file, f"{folder}/{file.name}")


def _keep_final(directory: RunDirectory, chain: Chain) -> None:
    """Put the last model and its sidecar files into the run's folder."""
    last = chain.results[-1] if chain.results else chain.preparation
    if last is None:
        chain.final.load().save(directory.path / "model.pt2")
    else:
        _take_all(directory, last.folder, ".")


def _report(
    recipe: Recipe,
    chain: Chain,
    preparation: dict[str, Any],
    baseline: tuple[Proof, dict[str, Any]],
    between: Mapping[int, dict[str, Any]],
    final: tuple[Proof, dict[str, Any]],
) -> dict[str, Any]:
    (baseline_proof, of_baseline), (final_proof, of_final) = baseline, final
    verdicts = judge(recipe.goals, baseline=of_baseline, final=of_final)
    results = chain.results
    of_stages = [*map(between.get, range(len(results) - 1)), of_final]
    named = [(result.name, measured) for result, measured in zip(results, of_stages, strict=True)]
    slow = slowdowns(of_baseline, named, {result.name for result in results if result.config.family == "quantize"})
    timed = recipe.measure.per_stage or between
    # The final file was scored on test; a stage is held against the one before it, on val.
    of_last = {**of_final, "quality": results[-1].facts["quality"]}
    shown = [*of_stages[:-1], of_last] if timed else [None] * len(results)
    return {
        "version": REPORT_VERSION,
        "name": recipe.name,
        "command": sys.argv[1:],
        "recipe": recipe.resolved,
        "environment": describe(),
        "device": chain.surroundings.device.model_dump(mode="json"),
        "preparation": preparation,
        "baseline": of_baseline,
        "final": of_final,
        "stages": [_stage_entry(result, measured) for result, measured in zip(results, shown, strict=True)],
        "goals": [asdict(verdict) for verdict in verdicts],
        "goals_met": all(verdict.met for verdict in verdicts),
        "parity": final_proof.parity,
        "baseline_parity": baseline_proof.parity,
        "kernels": final_proof.kernels,
        "notices": [
            *chain.original.load().spec.notices,
            *baseline_proof.notices,
            *final_proof.notices,
            *slow,
            *remedies(slow, [(result.name, result.config) for result in results]),
        ],
    }


_UNMEASURED = (
    "size_bytes",
    "zipped_bytes",
    "latency_ms",
    "throughput_per_s",
    "peak_memory_bytes",
    "energy_j",
    "cost_per_million",
)


def _given(recipe: Recipe, prover: Prover, baseline: Proof) -> dict[str, Any]:
    """Return the entry of an uncompressed model that was there: what the first stage cost is told against it."""
    source = next((kind for kind in ("checkpoint", "pt2") if getattr(recipe.model, kind) is not None), "model")
    figures = {**dict.fromkeys(_UNMEASURED), **baseline.counts, "quality": prover.quality_before(baseline.model)}
    entry = {"name": "baseline", "family": "given", "method": source, "seconds": 0.0, "cached": False}
    return {**entry, "measurement": figures, "notes": {}}


def _stage_entry(result: StageResult, measured: dict[str, Any] | None) -> dict[str, Any]:
    facts = result.facts
    counts = {"params": facts["params"], "macs": facts["macs"]}
    figures = measured if measured is not None else dict.fromkeys(_UNMEASURED)
    return {
        "name": result.name,
        "family": result.config.family,
        "method": result.config.method,
        "seconds": facts["seconds"],
        "cached": result.cached,
        "measurement": {"quality": facts["quality"], **figures, **counts},
        "notes": finite(facts["notes"]),
    }
