"""Joins the runs of a sweep into one table, marks its Pareto front, and writes it as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mil_cli.errors import OutputError
from mil_cli.files import write_json, write_text
from mil_cli.measure.statistics import SAME_WITHIN
from mil_cli.report import charts, text, view
from mil_cli.report.html import environment
from mil_cli.report.load import FILE, Report, load_report
from mil_cli.report.terminal import line, met_text, new_table, show

SWEEP_VERSION = 1
POINT_FILE = "point.json"
"""What a point of a sweep leaves beside its run: its overrides, exit code and message."""

JSON_FILE = "sweep.json"
PAGE_FILE = "sweep.html"
_COMPLETE = (0, 3)

FRONT = (
    "on the Pareto front of quality, latency and size: no other point is better in one of them and as good in the"
    " others; latencies within 3 % count as equal"
)
"""What the mark of the front means."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        name: The name of its folder.
        overrides: What made it, such as ``stages.prune.macs=0.2``.
        report: Its report; None if it did not end.
        problem: Why it did not end.
        on_front: Whether no other point is better in one of quality, latency and size and as good in the others.
    """

    name: str
    overrides: tuple[str, ...]
    report: Report | None
    problem: str = ""
    on_front: bool = False


@dataclass(frozen=True)
class Sweep:
    """A sweep's points, joined.

    Attributes:
        name: The name of the sweep's folder.
        points: The points, those that did not end included.
        same_baseline: Whether all compare with the same uncompressed model.
        notices: What the reader must know.
    """

    name: str
    points: list[Point]
    same_baseline: bool
    notices: list[str] = field(default_factory=list)

    @property
    def complete(self) -> list[tuple[Point, Report]]:
        """The points that ended, with their reports."""
        return [(point, point.report) for point in self.points if point.report is not None]


def join_sweep(directory: Path) -> Sweep:
    """Read the points of a sweep, or any runs that lie in one folder.

    Args:
        directory: The folder; each sub-folder with a report or a point's outcome is one point.

    Raises:
        OutputError: There is no point in it, or a report is damaged.
    """
    if not directory.is_dir():
        hint = "name a folder below runs/"
        raise OutputError("there is no such folder", where=str(directory), hint=hint)
    # A link such as `latest` would count a run twice.
    folders = [folder for folder in directory.iterdir() if folder.is_dir() and not folder.is_symlink()]
    points = []
    for folder in sorted(folders, key=lambda path: path.name.zfill(9) if path.name.isdigit() else path.name):
        if (folder / FILE).is_file() or (folder / POINT_FILE).is_file():
            points.append(_read_point(folder))
    if not points:
        hint = "name the folder that holds the runs' folders"
        raise OutputError("there is no run in this folder", where=str(directory), hint=hint)
    reports = [point.report for point in points if point.report is not None]
    same_baseline = len({_identity(report["baseline"]) for report in reports}) <= 1
    sweep = Sweep(directory.absolute().name, points, same_baseline)
    if len({_metric(report) for report in reports}) > 1:
        sweep.notices.append("the runs have different metrics: they cannot be ranked, and no front is marked")
        return sweep
    marked = [
        Point(point.name, point.overrides, point.report, point.problem, on_front)
        for point, on_front in zip(points, _front(sweep), strict=True)
    ]
    if not same_baseline:
        sweep.notices.append(
            "the runs start from different uncompressed models: latencies are compared in milliseconds, which were"
            " taken at different times"
        )
    return Sweep(sweep.name, marked, same_baseline, sweep.notices)


def _read_point(folder: Path) -> Point:
    outcome: dict[str, Any] = {}
    file = folder / POINT_FILE
    if file.is_file():
        try:
            outcome = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            hint = "run the point again"
            raise OutputError(f"the point's outcome cannot be read: {error}", where=str(file), hint=hint) from None
    overrides = tuple(map(str, outcome.get("overrides", [])))
    code = outcome.get("exit_code", 0)
    if code in _COMPLETE and (folder / FILE).is_file():
        return Point(folder.name, overrides, load_report(folder))
    problem = str(outcome.get("message") or "").splitlines()
    return Point(folder.name, overrides, None, problem[0] if problem else f"ended with exit code {code}")


def _identity(baseline: dict[str, Any]) -> str:
    return json.dumps([baseline.get(key) for key in ("size_bytes", "macs", "params", "quality")], sort_keys=True)


def _metric(report: Report) -> tuple[str, str, bool]:
    quality = report["final"].get("quality") or {}
    return str(quality.get("metric")), str(quality.get("split")), bool(quality.get("higher_is_better"))


def _front(sweep: Sweep) -> list[bool]:
    figures = [None if point.report is None else _objectives(point.report, sweep) for point in sweep.points]
    return [
        own is not None and not any(other is not None and _dominates(other, own) for other in figures)
        for own in figures
    ]


Objectives = tuple[float, float, float]


def _objectives(report: Report, sweep: Sweep) -> Objectives | None:
    """Return (worseness of quality, latency, size), each smaller is better; None if one was not measured."""
    final = report["final"]
    quality, latency, size = final.get("quality"), final.get("latency_ms"), final.get("size_bytes")
    if not quality or not latency or size is None:
        return None
    worse = -quality["value"] if quality["higher_is_better"] else quality["value"]
    return worse, latency["ratio_to_baseline"] if sweep.same_baseline else latency["p50"], float(size)


def _dominates(one: Objectives, other: Objectives) -> bool:
    """Whether `one` is as good in all and better in at least one; latencies within 3 % are no difference."""
    as_good = one[0] <= other[0] and one[1] <= other[1] * (1 + SAME_WITHIN) and one[2] <= other[2]
    better = one[0] < other[0] or one[1] * (1 + SAME_WITHIN) < other[1] or one[2] < other[2]
    return as_good and better


def sweep_json(sweep: Sweep) -> dict[str, Any]:
    """Return the joined sweep for programs."""
    points = []
    for point in sweep.points:
        final = None if point.report is None else point.report["final"]
        points.append(
            {
                "name": point.name,
                "overrides": list(point.overrides),
                "problem": point.problem or None,
                "final": final,
                "goals": [] if point.report is None else point.report["goals"],
                "goals_met": None if point.report is None else point.report["goals_met"],
                "on_front": point.on_front,
            }
        )
    return {
        "version": SWEEP_VERSION,
        "name": sweep.name,
        "objectives": ["quality", "latency", "size"],
        "same_baseline": sweep.same_baseline,
        "front": [point.name for point in sweep.points if point.on_front],
        "points": points,
        "notices": sweep.notices,
    }


def render_sweep(directory: Path, console: Console) -> None:
    """Print the table of a sweep and write it into its folder as `sweep.json` and `sweep.html`.

    Args:
        directory: The sweep's folder.
        console: Where it is printed.

    Raises:
        OutputError: There is no run in it, a report is damaged, or the folder cannot be written.
    """
    sweep = join_sweep(directory)
    print_sweep(sweep, console)
    write_json(directory / JSON_FILE, sweep_json(sweep))
    write_text(directory / PAGE_FILE, sweep_page(sweep))


def labels(sweep: Sweep) -> dict[str, str]:
    """Return what tells each point apart: the overrides that not all have, as short as stays clear, or its folder."""
    keys = {override.partition("=")[0] for point in sweep.points for override in point.overrides}
    short: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        endings = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        short[key] = next(
            ending
            for ending in endings
            if ending == key or sum(f".{other}".endswith(f".{ending}") for other in keys) == 1
        )
    named, everywhere = {}, shared_overrides(sweep)
    for point in sweep.points:
        shown = []
        for override in point.overrides:
            key, sign, value = override.partition("=")
            if override not in everywhere:
                shown.append(written(key) if key.startswith("~") else f"{short[key]}{sign}{value}")
        named[point.name] = " ".join(shown) or point.name
    return named


def shared_overrides(sweep: Sweep) -> list[str]:
    """Return the overrides that all of several points have, which tell none of them apart."""
    first, *others = sweep.points
    return [override for override in first.overrides if others and all(override in other.overrides for other in others)]


def written(override: str) -> str:
    """Return an override as a user writes it: what is removed by ``~`` has no value, though Hydra reports one."""
    return override.removesuffix("=null") if override.startswith("~") else override


def print_sweep(sweep: Sweep, console: Console) -> None:
    """Print the table of a sweep."""
    rows = sweep_rows(sweep)
    table = new_table(f"{escape(sweep.name)}: {len(rows)} points", *map(escape, _columns(sweep)), numbers_from=3)
    for row in rows:
        if row.problem:
            table.add_row("", escape(row.name), escape(row.label), "[bold red]did not end[/bold red]")
            continue
        cells = [row.quality, row.drop, row.size, row.latency, row.speed, row.macs, row.params]
        goals = met_text(row.met) if row.goals == 1 else f"{met_text(row.met)} {row.goals_met}/{row.goals}"
        star = "[bold cyan]*[/bold cyan]" if row.on_front else ""
        table.add_row(star, escape(row.name), escape(row.label), *cells, goals if row.goals else "")
    show(console, table)
    if everywhere := shared_overrides(sweep):
        line(console, f"every point: {escape(' '.join(map(written, everywhere)))}")
    if any(row.on_front for row in rows):
        line(console, f"* {FRONT}")
    for row in rows:
        if row.problem:
            line(console, f"[bold red]point {escape(row.name)}[/bold red]: {escape(row.problem)}")
    for notice in sweep.notices:
        line(console, f"[yellow]note:[/yellow] {escape(notice)}")


def _columns(sweep: Sweep) -> list[str]:
    reports = [report for _, report in sweep.complete]
    metric, split, _ = _metric(reports[0]) if reports else ("quality", "test", True)
    quality = f"{metric} ({split})"
    return ["", "point", "overrides", quality, "drop", "file", "latency p50", "ratio", "macs", "params", "goals"]


@dataclass(frozen=True)
class SweepRow:
    """One point, written for people.

    Attributes:
        name: Its folder.
        label: Its overrides.
        problem: Why it did not end; all else is empty then.
        quality: The metric.
        drop: How much worse than the uncompressed model's, relative.
        size: Bytes of the file.
        latency: Median latency.
        speed: Its ratio to the uncompressed model, with the interval.
        macs: Multiply-accumulates.
        params: Parameters.
        goals: How many goals there are.
        goals_met: How many are met.
        met: Whether all are met.
        on_front: Whether it is on the front.
        page: Its own page, relative to the sweep's folder.
    """

    name: str
    label: str
    problem: str = ""
    quality: str = ""
    drop: str = ""
    size: str = ""
    latency: str = ""
    speed: str = ""
    macs: str = ""
    params: str = ""
    goals: int = 0
    goals_met: int = 0
    met: bool = False
    on_front: bool = False
    page: str = ""


def sweep_rows(sweep: Sweep) -> list[SweepRow]:
    """Return the points, written for people."""
    named = labels(sweep)
    return [
        SweepRow(point.name, named[point.name], point.problem)
        if point.report is None
        else _row(point, point.report, named[point.name])
        for point in sweep.points
    ]


def _row(point: Point, report: Report, label: str) -> SweepRow:
    baseline, final, goals = report["baseline"], report["final"], report["goals"]
    latency = final.get("latency_ms")
    shown = "" if not latency else f"{latency['ratio_to_baseline']:.3f} {_interval(latency['ratio_ci95'])}"
    return SweepRow(
        name=point.name,
        label=label,
        quality=text.quality((final.get("quality") or {}).get("value")),
        drop=_drop(baseline.get("quality"), final.get("quality")),
        size=text.size(final.get("size_bytes")),
        latency=text.milliseconds(latency["p50"] if latency else None),
        speed=shown,
        macs=text.count(final.get("macs")),
        params=text.count(final.get("params")),
        goals=len(goals),
        goals_met=sum(bool(goal["met"]) for goal in goals),
        met=bool(report["goals_met"]),
        on_front=point.on_front,
        page=f"{point.name}/report.html",
    )


def _interval(bounds: Sequence[float]) -> str:
    return f"({bounds[0]:.3f} to {bounds[1]:.3f})"


def _drop(baseline: dict[str, Any] | None, final: dict[str, Any] | None) -> str:
    if not baseline or not final or not baseline["value"]:
        return text.NOT_MEASURED
    difference = baseline["value"] - final["value"]
    worse = difference if final["higher_is_better"] else -difference
    return text.percent(worse / abs(baseline["value"]))


def sweep_page(sweep: Sweep) -> str:
    """Return the sweep's page."""
    rows = sweep_rows(sweep)
    template = environment().get_template("sweep.html.j2")
    return template.render(
        title=sweep.name,
        columns=_columns(sweep)[3:],
        everywhere=[written(override) for override in shared_overrides(sweep)],
        rows=rows,
        ended=len(sweep.complete),
        reached=sum(row.met and row.goals > 0 for row in rows),
        with_goals=any(row.goals for row in rows),
        charts=[chart for chart in _charts(sweep) if chart is not None],
        device=view.device_line(sweep.complete[0][1]) if sweep.complete else "",
        notices=sweep.notices,
        front=FRONT,
        baseline=_baseline_line(sweep),
    )


def _baseline_line(sweep: Sweep) -> str:
    """Say what the uncompressed model reaches, if all points have the same."""
    if not sweep.complete or not sweep.same_baseline:
        return ""
    baseline = sweep.complete[0][1]["baseline"]
    quality, latency = baseline.get("quality"), baseline.get("latency_ms")
    parts = [f"{quality['metric']} {text.quality(quality['value'])}" if quality else ""]
    parts += [text.size(baseline.get("size_bytes")), text.milliseconds(latency["p50"]) if latency else ""]
    return ", ".join(part for part in parts if part)


def _charts(sweep: Sweep) -> list[charts.Chart | None]:
    reports = [report for _, report in sweep.complete]
    if not reports or len({_metric(report) for report in reports}) > 1:
        return []
    metric, split, higher_is_better = _metric(reports[0])
    y_label = f"{metric} ({split})"
    relative = sweep.same_baseline

    def latency(figures: dict[str, Any]) -> float | None:
        measured = figures.get("latency_ms")
        return None if not measured else float(measured["ratio_to_baseline"] if relative else measured["p50"])

    def size(figures: dict[str, Any]) -> float | None:
        return figures.get("size_bytes")

    return [
        charts.scatter(
            f"{y_label} against latency",
            _dots(sweep, latency, text.times if relative else text.milliseconds),
            x_label="median latency, relative to the uncompressed model" if relative else "median latency, ms",
            y_label=y_label,
            write_x=charts.mark,
            higher_is_better=higher_is_better,
        ),
        charts.scatter(
            f"{y_label} against file size",
            _dots(sweep, size, text.size),
            x_label="file size (logarithmic)",
            y_label=y_label,
            write_x=text.size,
            logarithmic=True,
            higher_is_better=higher_is_better,
        ),
    ]


def _dots(
    sweep: Sweep, figure: Callable[[dict[str, Any]], float | None], write: Callable[[float], str]
) -> list[charts.Sample]:
    named = labels(sweep)
    dots = []
    for point, report in sweep.complete:
        value, quality = figure(report["final"]), report["final"].get("quality")
        if value is not None and quality:
            title = f"{named[point.name]}: {quality['value']:.4f}, {write(value)}"
            dots.append(charts.Sample(value, quality["value"], point.name, title, point.on_front))
    return dots
