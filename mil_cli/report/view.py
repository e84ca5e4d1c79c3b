"""What a report says, in the lines that the terminal and the page both show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mil_cli.measure.energy import estimated_joules
from mil_cli.measure.statistics import NO_DIFFERENCE, verdict
from mil_cli.report import text
from mil_cli.report.load import Report

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class GoalLine:
    """A goal, judged.

    Attributes:
        name: What it is about, such as ``latency, relative to baseline``.
        bound: The bound as written, such as ``at most 0.25x``.
        value: What was reached.
        margin: Room left (with a plus), or by how much it is missed, relative to the bound.
        met: Whether it is met.
        used: Share of an upper bound that is used up, for a gauge; None where there is none.
    """

    name: str
    bound: str
    value: str
    margin: str
    met: bool
    used: float | None


@dataclass(frozen=True)
class ComparisonLine:
    """One figure of the uncompressed and of the final model.

    Attributes:
        name: The figure, with how it was obtained.
        baseline: The uncompressed model's.
        final: The final model's.
        change: How they compare.
        better: Whether the final model is better; None: neither.
    """

    name: str
    baseline: str
    final: str
    change: str
    better: bool | None


@dataclass(frozen=True)
class StageLine:
    """What one stage gained and cost.

    Attributes:
        name: Its key in the recipe.
        method: Family and method.
        quality: Quality after it, on the split of `StagesView.split`.
        quality_change: Against the stage before; empty where there is nothing to compare with.
        worse: Whether quality fell.
        macs: Multiply-accumulates after it.
        macs_kept: As a share of the uncompressed model's.
        params: Parameters after it.
        params_kept: As a share of the uncompressed model's.
        size: Bytes of its file, where it was exported.
        latency: Its median latency and ratio to the uncompressed model, where it was timed.
        seconds: How long it took.
        cached: Whether its result came from the cache.
        notes: What the stage wrote down.
    """

    name: str
    method: str
    quality: str
    quality_change: str
    worse: bool
    macs: str
    macs_kept: float | None
    params: str
    params_kept: float | None
    size: str
    latency: str
    seconds: str
    cached: bool
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class StagesView:
    """All stages, with what they have in common.

    Attributes:
        lines: The stages, the making of the uncompressed model first if there was one.
        metric: The metric's name.
        split: The split of the qualities.
        measured: Whether size and latency were measured between stages.
        total: How long all took together when they were computed.
    """

    lines: list[StageLine]
    metric: str
    split: str
    measured: bool
    total: str


def goal_lines(report: Report) -> list[GoalLine]:
    """Return the goals."""
    return [goal_line(goal) for goal in report["goals"]]


_ABSOLUTE: dict[str, Callable[[float | None], str]] = {
    "quality": text.quality,
    "latency": lambda seconds: text.milliseconds(None if seconds is None else seconds * 1000),
    "size": text.size,
    "macs": text.count,
    "params": text.count,
    "memory": text.size,
    "energy": text.joules,
    "cost": text.plain,
}


def goal_line(goal: Figures) -> GoalLine:
    """Return one goal of a report (`name`, `kind`, `bound`, `value`, `met`; base units)."""
    name, kind = goal["name"], goal.get("kind", "max")
    bound, value = float(goal["bound"]), float(goal["value"])
    write = _ABSOLUTE.get(name, text.plain)
    word = "at least" if kind == "min" else "at most"
    if kind == "max_drop":
        title, write = f"{name} drop, relative", lambda share: text.percent(share or 0.0)
        room = bound - value
        margin = f"{'+' if room > 0 else ''}{100 * room:.2f} points"
    else:
        if kind == "max_ratio":
            title, write = f"{name}, relative to baseline", lambda ratio: text.times(ratio or 0.0)
        else:
            title = name
        room = value - bound if kind == "min" else bound - value
        margin = text.signed_percent(room / abs(bound)) if bound else text.plain(room)
    used = value / bound if kind != "min" and bound > 0 and math.isfinite(value) else None
    return GoalLine(
        title,
        f"{word} {write(bound)}",
        write(value),
        margin,
        bool(goal["met"]),
        None if used is None else max(0.0, used),
    )


def comparison_lines(report: Report) -> list[ComparisonLine]:
    """Return the figures of both models; those that neither has are left out."""
    baseline, final = report["baseline"], report["final"]
    lines = [_quality_comparison(baseline["quality"], final["quality"])]
    lines.append(_smaller("file size", baseline, final, "size_bytes", text.size, "smaller", "larger"))
    lines.append(_smaller("file size, zipped", baseline, final, "zipped_bytes", text.size, "smaller", "larger"))
    lines += _latency_comparison(baseline, final)
    lines.append(_throughput(baseline, final))
    lines.append(_smaller("multiply-accumulates", baseline, final, "macs", text.count, "fewer"))
    lines.append(_smaller("parameters", baseline, final, "params", text.count, "fewer"))
    lines.append(_smaller("peak memory", baseline, final, "peak_memory_bytes", text.size))
    energy = "energy of one inference" + (" (estimate: watts x time)" if energy_is_estimate(report) else "")
    lines.append(_smaller(energy, baseline, final, "energy_j", text.joules))
    lines.append(_smaller("cost of a million inferences", baseline, final, "cost_per_million", text.plain))
    return [line for line in lines if line is not None]


def energy_is_estimate(report: Report) -> bool:
    """Whether the energies are the device profile's watts times the latency, and no reading of a counter."""
    watts = (report.get("device") or {}).get("watts")
    final = report["final"]
    if final.get("energy_j") is None or watts is None or not final.get("latency_ms"):
        return False
    return math.isclose(final["energy_j"], estimated_joules(final["latency_ms"]["p50"], watts) or 0.0, rel_tol=1e-9)


def _quality_comparison(baseline: Figures | None, final: Figures | None) -> ComparisonLine | None:
    if not baseline or not final:
        return None
    difference = final["value"] - baseline["value"]
    drop = -difference if final["higher_is_better"] else difference
    if difference == 0:
        change = "the same"
    else:
        relative = f" ({text.signed_percent(difference / abs(baseline['value']))})" if baseline["value"] else ""
        change = f"{text.change(difference)}{relative}"
    name = f"{final['metric']}, {final['split']} split, {final['samples']:,} samples"
    return ComparisonLine(
        name, text.quality(baseline["value"]), text.quality(final["value"]), change, None if drop == 0 else drop < 0
    )


def _smaller(
    name: str,
    baseline: Figures,
    final: Figures,
    key: str,
    write: Callable[[float | None], str],
    less: str = "less",
    more: str = "more",
) -> ComparisonLine | None:
    before, after = baseline.get(key), final.get(key)
    if before is None and after is None:
        return None
    change, better = "", None
    if before and after:
        ratio = after / before
        better = None if math.isclose(ratio, 1.0, rel_tol=1e-3) else ratio < 1
        if better is None:
            change = "the same"
        else:
            change = f"{text.times(1 / ratio)} {less}" if better else f"{text.times(ratio)} {more}"
    return ComparisonLine(name, write(before), write(after), change, better)


def _latency_comparison(baseline: Figures, final: Figures) -> list[ComparisonLine]:
    before, after = baseline.get("latency_ms"), final.get("latency_ms")
    if not before or not after:
        return []
    word = latency_verdict(after)
    better = None if word == NO_DIFFERENCE else word == "faster"
    lines = [
        ComparisonLine(
            "latency, median (p50)",
            text.milliseconds(before["p50"]),
            text.milliseconds(after["p50"]),
            speed(after),
            better,
        )
    ]
    for key in ("p90", "p99"):
        lines.append(
            ComparisonLine(f"latency, {key}", text.milliseconds(before[key]), text.milliseconds(after[key]), "", None)
        )
    return lines


def latency_verdict(latency: Figures) -> str:
    """Return the verdict on a ``latency_ms`` against its baseline."""
    low, high = latency["ratio_ci95"]
    return verdict(latency["ratio_to_baseline"], (low, high))


def speed(latency: Figures) -> str:
    """Say how much faster or slower than its baseline a ``latency_ms`` is, with the interval."""
    ratio, (low, high) = latency["ratio_to_baseline"], latency["ratio_ci95"]
    word = latency_verdict(latency)
    if word == NO_DIFFERENCE:
        return f"{NO_DIFFERENCE} (ratio {ratio:.3f}, 95 % {low:.3f} to {high:.3f})"
    if word == "faster":
        return f"{text.times(1 / ratio)} faster (95 % {text.times(1 / high)} to {text.times(1 / low)})"
    return f"{text.times(ratio)} slower (95 % {text.times(low)} to {text.times(high)})"


def _throughput(baseline: Figures, final: Figures) -> ComparisonLine | None:
    before, after = baseline.get("throughput_per_s"), final.get("throughput_per_s")
    if before is None or after is None:
        return None
    return ComparisonLine(
        "throughput, one after the other", f"{text.count(before)}/s", f"{text.count(after)}/s", "", None
    )


def stages_view(report: Report) -> StagesView:
    """Return what each stage gained and cost."""
    baseline = report["baseline"]
    entries = ([report["preparation"]] if report.get("preparation") else []) + report["stages"]
    lines: list[StageLine] = []
    before: Figures | None = None
    for entry in entries:
        measured = entry["measurement"]
        lines.append(_stage_line(entry, before, baseline))
        before = measured.get("quality")
    qualities = [entry["measurement"]["quality"] for entry in entries if entry["measurement"].get("quality")]
    return StagesView(
        lines=lines,
        metric=qualities[-1]["metric"] if qualities else "quality",
        split=qualities[-1]["split"] if qualities else "val",
        measured=any(entry["measurement"].get("latency_ms") for entry in report["stages"]),
        total=text.duration(sum(entry["seconds"] for entry in entries)),
    )


def _stage_line(entry: Figures, before: Figures | None, baseline: Figures) -> StageLine:
    measured = entry["measurement"]
    now = measured.get("quality")
    change, worse = "", False
    if now and before and now["metric"] == before["metric"]:
        difference = now["value"] - before["value"]
        change = text.change(difference)
        worse = difference < 0 if now["higher_is_better"] else difference > 0
    latency = measured.get("latency_ms")
    shown = text.NOT_MEASURED
    if latency:
        shown = f"{text.milliseconds(latency['p50'])} ({text.times(latency['ratio_to_baseline'])})"
    return StageLine(
        name=entry["name"],
        method=f"{entry['family']}/{entry['method']}",
        quality=text.quality(now["value"] if now else None),
        quality_change=change,
        worse=worse,
        macs=text.count(measured.get("macs")),
        macs_kept=_kept(measured.get("macs"), baseline.get("macs")),
        params=text.count(measured.get("params")),
        params_kept=_kept(measured.get("params"), baseline.get("params")),
        size=text.size(measured.get("size_bytes")),
        latency=shown,
        seconds=text.duration(entry["seconds"]),
        cached=bool(entry["cached"]),
        notes=entry.get("notes") or {},
    )


@dataclass(frozen=True)
class LayerLine:
    """The bits of one layer.

    Attributes:
        name: The layer.
        weight_bits: Bits of its weight.
        activation_bits: Bits in which it reads its activation.
        share: Bits of its weight as a share of 8, for a bar.
        added_cost: What these bits alone were found to cost; empty where nobody looked.
    """

    name: str
    weight_bits: int
    activation_bits: int
    share: float
    added_cost: str


def layer_lines(stage: StageLine) -> list[LayerLine]:
    """Return the bits of the layers of a stage that did not give all of them the same."""
    costs = {entry["name"]: entry for entry in stage.notes.get("sensitivities") or []}

    def added(name: str, bits: int) -> str:
        known = dict(zip(costs[name]["bits"], costs[name]["added_cost"], strict=True)) if name in costs else {}
        return text.plain(known[bits]) if bits in known else ""

    return [
        LayerLine(name, weight, layer["activation_bits"], weight / 8, added(name, weight))
        for layer in stage.notes.get("layers") or []
        if isinstance(layer, Mapping) and {"weight_bits", "activation_bits"} <= layer.keys()
        for name, weight in [(layer["name"], layer["weight_bits"])]
    ]


def convergence_lines(stage: StageLine, *, metric: str) -> list[str]:
    """Say how many steps a distilled training needed for qualities that plain training of the same student reached."""
    convergence = stage.notes.get("convergence")
    if not isinstance(convergence, Mapping):
        return []
    lines = []
    for level in convergence["reached"]:
        own, alone = level["steps"], level["plain_steps"]
        needed = "never reached" if own is None else f"reached after {own:,} steps"
        beside = "" if alone is None else f", by plain training of the same student after {alone:,}"
        part = "" if own is None or not alone else f" ({text.percent(own / alone, 0)} of the steps)"
        lines.append(f"{metric} of {text.quality(level['quality'])} on val: {needed}{beside}{part}")
    own_time, plain_time = text.duration(convergence["seconds"]), text.duration(convergence["plain_seconds"])
    lines.append(f"distilled training took {own_time}, plain training {plain_time}")
    return lines


def _kept(value: float | None, of: float | None) -> float | None:
    return value / of if value is not None and of else None


def parity_line(report: Report) -> str:
    """Say how the shipped file compares with the graph that it was exported from."""
    parity = report.get("parity")
    if not parity:
        return "the file was not compared with the graph that it was exported from"
    line = f"outputs differ by at most {parity['max_abs_diff']:.2g} on {parity['samples']:,} samples"
    if parity.get("metric_torch") is not None and parity.get("metric_onnx") is not None:
        quality = report["final"].get("quality") or {}
        name = f"{quality.get('metric', 'metric')}{' on ' + quality['split'] if quality.get('split') else ''}"
        line += f"; {name}: {text.quality(parity['metric_onnx'])} in onnxruntime, "
        line += f"{text.quality(parity['metric_torch'])} in torch"
    if parity.get("agreement") is not None:
        line += f"; predictions agree: {text.percent(math.floor(10_000 * parity['agreement'] + 1e-6) / 10_000)}"
    return line


def kernels_line(report: Report) -> str:
    """Say which kernels the shipped file runs on; nothing where it is not quantized."""
    kernels = report.get("kernels")
    if not kernels:
        return ""
    others = Counter({"layer with weights": len(kernels["float_layers"])}) + Counter(kernels["float_operators"])
    listed = ", ".join(f"{count} {name}" for name, count in others.most_common())
    return (
        f"{kernels['integer_layers']} of {kernels['quantized_layers']} quantized layers on integer kernels; "
        f"{kernels['conversions']} conversions of values; in float: {listed or 'nothing'}"
    )


def title(report: Report) -> str:
    """Return the run's name."""
    recipe = report["recipe"]
    return str(report.get("name") or recipe.get("name") or "run")


def device_line(report: Report) -> str:
    """Say what was measured on."""
    device = report.get("device") or {}
    if not device:
        return "device not recorded"
    parts = [str(device.get("name", "device"))]
    if device.get("description"):
        parts.append(str(device["description"]))
    threads = device.get("threads")
    if threads:
        parts.append(f"{threads} thread{'s' if threads != 1 else ''}")
    runtime = (report.get("environment") or {}).get("versions", {}).get("onnxruntime")
    if runtime:
        parts.append(f"onnxruntime {runtime}")
    return ", ".join(parts)


def outcome(report: Report) -> str:
    """Say in a few words whether the goals were met."""
    goals = report["goals"]
    if not goals:
        return "no goals were set"
    missed = sum(not goal["met"] for goal in goals)
    if not missed:
        return "all goals met" if len(goals) > 1 else "the goal is met"
    return f"{missed} of {len(goals)} goals missed"
