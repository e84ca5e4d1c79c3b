"""Self-contained pages: a run's report, and a sweep's table; styles and charts are inline, nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from mil_cli.files import write_text
from mil_cli.report import charts, text, view
from mil_cli.report.load import Report

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> jinja2.Environment:
    """Return the templates' environment: everything is escaped, an unknown name is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_html(report: Report, path: Path) -> None:
    """Write a run's page.

    Args:
        report: The content of `report.json`.
        path: The file to write.

    Raises:
        OutputError: It cannot be written.
    """
    write_text(path, page(report))


def page(report: Report) -> str:
    """Return a run's page."""
    stages = view.stages_view(report)
    template = environment().get_template("report.html.j2")
    return template.render(
        title=view.title(report),
        outcome=view.outcome(report),
        verdict=_verdict(report),
        device=view.device_line(report),
        tiles=_tiles(report),
        goals=view.goal_lines(report),
        comparison=view.comparison_lines(report),
        spans=charts.latency_spans(report),
        stages=stages,
        details=[_details(stage, metric=stages.metric) for stage in stages.lines],
        parity=view.parity_line(report),
        kernels=view.kernels_line(report),
        notices=report.get("notices") or [],
        estimate=view.energy_is_estimate(report),
        command=" ".join(["mil", *map(str, report["command"])]) if report.get("command") else "",
        recipe=yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True),
        surroundings=yaml.safe_dump(
            {"environment": report.get("environment"), "device": report.get("device")}, sort_keys=False
        ),
    )


def _verdict(report: Report) -> str:
    if not report["goals"]:
        return "none"
    return "met" if report["goals_met"] else "missed"


def _tiles(report: Report) -> list[dict[str, str]]:
    """Return the figures that stand out at the top: a number and what it is."""
    baseline, final = report["baseline"], report["final"]
    tiles = []
    if baseline.get("size_bytes") and final.get("size_bytes"):
        factor = baseline["size_bytes"] / final["size_bytes"]
        note = f"{text.size(baseline['size_bytes'])} to {text.size(final['size_bytes'])}"
        tiles.append({"value": text.times(factor), "name": "smaller file", "note": note})
    latency = final.get("latency_ms")
    if latency:
        word = view.latency_verdict(latency)
        low, high = latency["ratio_ci95"]
        name = {"faster": "faster", "slower": "as fast"}.get(word, "as fast: no real difference")
        note = f"95 %: {text.times(1 / high)} to {text.times(1 / low)}"
        tiles.append({"value": text.times(1 / latency["ratio_to_baseline"]), "name": name, "note": note})
    if baseline.get("macs") and final.get("macs"):
        note = f"{text.count(baseline['macs'])} to {text.count(final['macs'])}"
        tiles.append({"value": text.times(baseline["macs"] / final["macs"]), "name": "fewer operations", "note": note})
    quality, before = final.get("quality"), baseline.get("quality")
    if quality and before:
        note = f"{text.quality(before['value'])} to {text.quality(quality['value'])}, {quality['split']} split"
        change = text.change(quality["value"] - before["value"])
        tiles.append({"value": change, "name": quality["metric"], "note": note})
    return tiles


def _details(stage: view.StageLine, *, metric: str) -> dict[str, Any]:
    """Return what a stage wrote down: facts, a training curve, changed widths, and the rest as JSON."""
    notes = dict(stage.notes)
    history = notes.pop("history", None)
    widths = notes.pop("widths", None)
    convergence = notes.pop("convergence", None)
    layers = view.layer_lines(stage)
    if layers:
        del notes["layers"]
    facts = {name: value for name, value in notes.items() if isinstance(value, str | int | float | bool)}
    rest = {name: value for name, value in notes.items() if name not in facts and value not in (None, {}, [])}
    return {
        "name": stage.name,
        "method": stage.method,
        "facts": {name.replace("_", " "): _fact(value) for name, value in facts.items()},
        "charts": [chart for chart in _courses(history, convergence, metric=metric) if chart is not None],
        "convergence": view.convergence_lines(stage, metric=metric),
        "widths": _widths(widths),
        "layers": layers,
        "rest": json.dumps(rest, indent=1, ensure_ascii=False, default=str) if rest else "",
    }


def _courses(history: object, convergence: object, *, metric: str) -> Iterator[charts.Chart | None]:
    if isinstance(history, list):
        yield charts.training_chart(history, metric=metric)
    if isinstance(convergence, Mapping):
        yield charts.convergence_chart(convergence, metric=metric)


def _fact(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else text.plain(value) if isinstance(value, float) else str(value)


def _widths(widths: object) -> list[dict[str, str]]:
    if not isinstance(widths, list):
        return []
    return [
        {"parameter": str(entry["parameter"]), "before": _shape(entry["before"]), "after": _shape(entry["after"])}
        for entry in widths
        if isinstance(entry, Mapping) and {"parameter", "before", "after"} <= entry.keys()
    ]


def _shape(shape: object) -> str:
    return " x ".join(map(str, shape)) if isinstance(shape, list | tuple) else str(shape)
