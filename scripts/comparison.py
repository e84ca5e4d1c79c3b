"""What comparisons of methods share: points kept beside the page, processes that compute them, intervals, the table.

A comparison lists its points and gives a function that computes one. Each point runs in a process of its own; its row
is kept in a file beside the page as soon as it is there, so that an interrupted comparison goes on; the lines that
several machines made of their shards can be joined by ``cat``. A point holds the fingerprint of the code and settings
behind it: a row of other code or settings is not taken for it, unless that is asked for.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from scipy import stats

import mil_cli
from mil_cli.recipe.schema import Recipe
from mil_cli.report.text import duration
from mil_cli.run.cache import default_location
from mil_cli.run.environment import computing_environment
from mil_cli.stages.registry import StageConfig
from mil_cli.stages.surroundings import fingerprint_of
from scripts.pool import Report, append_row, read_rows, run, shard

Point = dict[str, Any]
"""What one result is of: method, seed and other coordinates, and ``of``, the fingerprint of its code and settings."""

Result = dict[str, Any]
Compute = Callable[[Point], Result]
"""Computes a point; a function of a module, or a `partial` of one, since it runs in another process."""

Value = Callable[[str, Mapping[str, Any], int], float | None]
"""(method, coordinates of a column, seed) -> what the table compares, smaller being better; None: not known."""

_CODE = ("export", "graph", "measure", "ops", "stages", "training")
_PRELOAD = ("scripts.comparison", "mil_cli.run.runner", "mil_cli.recipe.load", "torch.export")
_FOREIGN = "Some rows are of other code or settings than those of today, as an earlier run left them."
_SHOWN = 16
"""Hexadecimal digits of a fingerprint that rows hold."""


def point_of(origins: Mapping[str, str], method: str, column: Mapping[str, Any], seed: int) -> Point:
    """Return the point of a method in a column for a seed; `origins` gives the fingerprint of each method."""
    return {"method": method, **column, "seed": seed, "of": origins[method]}


@dataclass(frozen=True)
class Limits:
    """How points are computed.

    Attributes:
        jobs: Processes at a time.
        timeout: Seconds for one point.
        seconds: Seconds for all; what runs then is ended, and its point has no row. None: no bound.
        preload: Modules that every process finds imported.
    """

    jobs: int = 1
    timeout: float = 7200.0
    seconds: float | None = None
    preload: tuple[str, ...] = ()


class Rows:
    """The rows of a file by point.

    Args:
        file: One JSON object a line, as `compute` writes them.
        trusted: Whether rows of other code and settings are taken too.
    """

    def __init__(self, file: Path, *, trusted: bool = False) -> None:
        rows = read_rows(file)
        self._rows = {fingerprint_of(row["point"]): row for row in rows}
        self._trusted = {_without_origin(row["point"]): row for row in rows} if trusted else {}

    def __contains__(self, point: Point) -> bool:
        return self._row(point) is not None

    def _row(self, point: Point) -> Mapping[str, Any] | None:
        return self._rows.get(fingerprint_of(point), self._trusted.get(_without_origin(point)))

    def result(self, point: Point) -> Result | None:
        """Return what a point gave, or None if it has no row."""
        row = self._row(point)
        return None if row is None else row["result"]

    def missing(self, points: Sequence[Point], shard: tuple[int, int] = (1, 1)) -> list[Point]:
        """Return the points that have no row, of a shard (i, n): every n-th from the i-th."""
        index, count = shard
        return [point for point in points[index - 1 :: count] if point not in self]

    def foreign(self, points: Iterable[Point]) -> bool:
        """Return whether any row that is taken for one of these points is of other code or settings."""
        return any(point in self and fingerprint_of(point) not in self._rows for point in points)

    def stale(self, points: Iterable[Point]) -> int:
        """Return how many rows are of these points but of other code or settings."""
        names = {_without_origin(point) for point in points}
        current = {fingerprint_of(point) for point in points}
        return sum(_without_origin(row["point"]) in names for key, row in self._rows.items() if key not in current)

    def computed_on(self, points: Iterable[Point]) -> list[str]:
        """Return on what the rows of these points were computed, each kind of machine once."""
        found = map(self._row, points)
        return sorted({_machine(row["environment"]) for row in found if row is not None})


def _without_origin(point: Point) -> str:
    return fingerprint_of({key: value for key, value in point.items() if key != "of"})


def _machine(environment: Mapping[str, Any]) -> str:
    return f"torch {environment['torch']} on {environment['gpu'] or environment['isa']}"


def origin_of(recipe: Recipe, script: Path, *more: object, code: Sequence[str] = _CODE) -> str:
    """Return the fingerprint of what a recipe's chain computes, whatever the seed: settings, and the code behind them.

    Settings are those of all stages, since one may run another; code is that of whole folders, and of the comparison,
    since methods share most of it.

    Args:
        recipe: The recipe.
        script: The file of the comparison.
        more: What else the result rests on, JSON-able: the version of a peer.
        code: Folders of the package with the code that it rests on.
    """
    stages = {name: _settings(config) for name, config in recipe.stages.items()} if recipe.chain else {}
    baseline = None if recipe.baseline is None else _settings(recipe.baseline)
    settings = [recipe.model.model_dump(mode="json"), recipe.data, recipe.task, recipe.trainer.model_dump(mode="json")]
    facts = [list(recipe.chain), stages, baseline, settings]
    return fingerprint_of([facts, code_of(script, tuple(code)), *more])[:_SHOWN]


def _settings(config: StageConfig) -> list[object]:
    return [config.family, config.method, config.version, config.model_dump(mode="json")]


@cache
def code_of(script: Path, folders: tuple[str, ...] = _CODE) -> str:
    """Return the fingerprint of the sources in folders of the package, and of a comparison."""
    package = Path(mil_cli.__file__).parent
    shared = [file for folder in folders for file in sorted((package / folder).rglob("*.py"))]
    sources = {file.relative_to(package).as_posix(): file.read_text(encoding="utf-8") for file in shared}
    own = [file.read_text(encoding="utf-8") for file in (Path(__file__), script)]
    return fingerprint_of([sources, own])


def compute(
    work: Compute,
    phases: Sequence[Sequence[Point]],
    kept: Path,
    limits: Limits,
    shown: Callable[[Result], str] = json.dumps,
) -> list[str]:
    """Compute the points that have no row yet, each in a process of its own, and keep their rows as they come.

    Args:
        work: Computes one.
        phases: Points in the order of their worth; a phase starts when the one before has ended, so that what many
            points rest on is computed once.
        kept: The file of the rows.
        limits: How many at a time, and for how long.
        shown: What is printed of a result.

    Returns:
        Why points failed, one line for each; those for which the time did not suffice are among them.
    """
    kept.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    deadline = None if limits.seconds is None else start + limits.seconds
    failures = []
    for number, phase in enumerate(phases, 1):
        missing, begun = Rows(kept).missing(phase), time.monotonic()
        with ThreadPoolExecutor(limits.jobs) as threads:
            running = {threads.submit(_row, work, point, limits, deadline): point for point in missing}
            try:
                for done, future in enumerate(as_completed(running), 1):
                    point, row = running[future], future.result()
                    left = duration((time.monotonic() - begun) / done * (len(missing) - done))
                    said = f"[{number}/{len(phases)}: {done}/{len(missing)}, {left} left] "
                    if "ended" in row:
                        failures.append(f"{_label(point)}: {row['ended']}")
                        print(said + failures[-1], file=sys.stderr, flush=True)
                    else:
                        append_row(kept, {"point": point, **row})
                        print(f"{said}{_label(point)}: {shown(row['result'])}", file=sys.stderr, flush=True)
            except BaseException:  # an interruption: threads would wait for their processes
                threads.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.kill()
                raise
    return failures


def _label(point: Point) -> str:
    return " ".join(str(value) for key, value in point.items() if key != "of")


def _row(work: Compute, point: Point, limits: Limits, deadline: float | None) -> Result:
    start = time.monotonic()
    timeout = limits.timeout if deadline is None else min(limits.timeout, deadline - start)
    if timeout <= 0:
        return {"ended": "the time for all was over"}
    row = run(partial(_report, work), json.dumps(point), timeout=timeout, memory=None, preload=limits.preload)
    return row if "ended" in row else {**row, "seconds": round(time.monotonic() - start, 1)}


def _report(work: Compute, point: str, report: Report) -> None:
    report({"result": work(json.loads(point)), "environment": computing_environment()})


def table(
    methods: Sequence[str],
    columns: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    value: Value,
    *,
    reference: Sequence[str],
) -> list[str]:
    """Return the lines of a Markdown table: by method and column the mean over the seeds, and how it differs.

    The difference is that to the best method of the reference in the column, as an interval. The least mean of a
    column is in bold, whosever it is, where there are several methods.

    Args:
        methods: A line for each.
        columns: Their headings, and what `value` is given of them.
        seeds: What is averaged over, and paired.
        value: Gives a percentage; a mean over fewer than all seeds says over how many.
        reference: The methods that the others are compared with.
    """
    lines = ["| method | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    shown = {name: _shown(methods, column, seeds, value) for name, column in columns.items()}
    for method in methods:
        cells = [
            shown[name].get(method, "-") + _difference(method, column, seeds, value, reference)
            for name, column in columns.items()
        ]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return [*lines, *(["", "In bold: the least of a column, of methods with all seeds."] if len(methods) > 1 else [])]


def _shown(methods: Sequence[str], column: Mapping[str, Any], seeds: Sequence[int], value: Value) -> dict[str, str]:
    """Return the mean of each method that has one, as it is written."""
    known = {method: found for method in methods if (found := _known(method, column, seeds, value))}
    means = {method: f"{statistics.mean(found.values()):.2f}" for method, found in known.items()}
    least = min((float(means[method]) for method in known if len(known[method]) == len(seeds)), default=None)
    written = {}
    for method, mean in means.items():
        missing = len(known[method]) < len(seeds)
        bold = "" if missing or len(methods) < 2 or float(mean) != least else "**"
        few = f", {len(known[method])} of {len(seeds)} seeds" if missing else ""
        written[method] = f"{bold}{mean} %{bold}{few}"
    return written


def _difference(
    method: str, column: Mapping[str, Any], seeds: Sequence[int], value: Value, reference: Sequence[str]
) -> str:
    """Return the interval of a method's difference to the best of the reference; nothing where there is none."""
    own = _known(method, column, seeds, value)
    others = [found for other in reference if (found := _known(other, column, seeds, value))]
    if not own or method in reference or not others:
        return ""
    most = max(map(len, others))  # one that has all its seeds before one that does well on a few
    best = min((one for one in others if len(one) == most), key=lambda found: statistics.mean(found.values()))
    interval = paired_interval([(own[seed], best[seed]) for seed in own if seed in best])
    return "" if interval is None else f" ({interval[0]:+.2f} to {interval[1]:+.2f})"


def _known(method: str, column: Mapping[str, Any], seeds: Sequence[int], value: Value) -> dict[int, float]:
    found = {seed: value(method, column, seed) for seed in seeds}
    return {seed: one for seed, one in found.items() if one is not None}


def paired_interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of first minus second (Student's t), or None with fewer than two pairs."""
    if len(pairs) < 2:
        return None
    differences = [first - second for first, second in pairs]
    half = float(stats.t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(differences) / len(pairs) ** 0.5
    middle = statistics.mean(differences)
    return middle - half, middle + half


def parser_of(description: str | None, *, methods: Sequence[str], out: Path) -> argparse.ArgumentParser:
    """Return a parser of what every comparison takes.

    Args:
        description: What the comparison is.
        methods: Those that there are.
        out: The page, unless another is named.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(methods), choices=methods, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--out", type=Path, default=out, help="the page; its rows are kept beside it (.jsonl)")
    parser.add_argument("--jobs", type=int, default=1, help="points at a time, each in a process of its own")
    parser.add_argument("--timeout", type=float, default=Limits.timeout, help="seconds for one point")
    parser.add_argument("--seconds", type=float, help="end after so many: what is there by then makes the table")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="every N-th point from the I-th")
    parser.add_argument("--known-only", action="store_true", help="compute nothing: the table of what is there")
    parser.add_argument("--trust-rows", action="store_true", help="take rows of other code and settings too")
    return parser


def carry_out(
    arguments: argparse.Namespace,
    work: Callable[[Path, Sequence[str], Path, Point], Result],
    phases: Sequence[Sequence[Point]],
    page: Callable[[Rows], Sequence[str]],
    *,
    preload: tuple[str, ...] = (),
) -> int:
    """Compute what is missing, write the page, print it; return 1 if a point failed or nothing is known for a page.

    Args:
        arguments: What a parser of `parser_of` made.
        work: (recipe file, overrides, cache folder, point) -> what the point gives; a function of a module.
        phases: The points, see `compute`.
        page: Makes the page's lines of the rows.
        preload: Modules that processes find imported, beside those that any recipe needs.
    """
    points = [point for phase in phases for point in phase]
    kept = arguments.out.with_suffix(".jsonl")
    known = Rows(kept, trusted=arguments.trust_rows)
    missing = [known.missing(phase, arguments.shard) for phase in phases]
    limits = Limits(
        jobs=arguments.jobs, timeout=arguments.timeout, seconds=arguments.seconds, preload=(*_PRELOAD, *preload)
    )
    computing = partial(work, arguments.recipe, tuple(arguments.set), default_location())
    failures = [] if arguments.known_only else compute(computing, missing, kept, limits)
    rows = Rows(kept, trusted=arguments.trust_rows)
    stale = 0 if arguments.trust_rows else rows.stale(points)
    if stale:
        print(f"{stale} rows of {kept} are of other code or settings and are left out", file=sys.stderr)
    if arguments.known_only and arguments.out.exists() and not any(point in rows for point in points):
        print(f"no row of {kept} is of these points, code and settings: {arguments.out} is left alone", file=sys.stderr)
        return 1
    text = "\n".join([*page(rows), *(["", _FOREIGN] if rows.foreign(points) else [])]) + "\n"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
