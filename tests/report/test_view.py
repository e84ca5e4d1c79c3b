from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mil_cli.report import html, view

Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("goal", "name", "bound", "value", "margin"),
    [
        (
            {"name": "quality", "kind": "max_drop", "bound": 0.01, "value": 0.004},
            "quality drop, relative",
            "at most 1.00 %",
            "0.40 %",
            "+0.60 points",
        ),
        (
            {"name": "quality", "kind": "max_drop", "bound": 0.01, "value": -0.002},
            "quality drop, relative",
            "at most 1.00 %",
            "-0.20 %",
            "+1.20 points",
        ),
        (
            {"name": "quality", "kind": "max_drop", "bound": 0.01, "value": 0.015},
            "quality drop, relative",
            "at most 1.00 %",
            "1.50 %",
            "-0.50 points",
        ),
        (
            {"name": "quality", "kind": "min", "bound": 0.9, "value": 0.945},
            "quality",
            "at least 0.9000",
            "0.9450",
            "+5.0 %",
        ),
        (
            {"name": "latency", "kind": "max", "bound": 0.002, "value": 0.0015},
            "latency",
            "at most 2.00 ms",
            "1.50 ms",
            "+25.0 %",
        ),
        (
            {"name": "latency", "kind": "max_ratio", "bound": 0.25, "value": 0.3},
            "latency, relative to baseline",
            "at most 0.250x",
            "0.300x",
            "-20.0 %",
        ),
        (
            {"name": "size", "kind": "max", "bound": 100_000.0, "value": 98_200.0},
            "size",
            "at most 100 kB",
            "98.2 kB",
            "+1.8 %",
        ),
        ({"name": "macs", "kind": "max", "bound": 6e6, "value": 3e6}, "macs", "at most 6.00 M", "3.00 M", "+50.0 %"),
        (
            {"name": "energy", "kind": "max", "bound": 0.003, "value": 0.0015},
            "energy",
            "at most 3.00 mJ",
            "1.50 mJ",
            "+50.0 %",
        ),
    ],
)
def test_goals_are_written_with_their_margin(
    goal: dict[str, Any], name: str, bound: str, value: str, margin: str
) -> None:
    line = view.goal_line({**goal, "met": True})
    assert (line.name, line.bound, line.value, line.margin) == (name, bound, value, margin)


def test_gauges_show_upper_bounds_only() -> None:
    goal = {"name": "size", "kind": "max", "bound": 4.0, "value": 1.0, "met": True}
    assert view.goal_line(goal).used == pytest.approx(0.25)
    assert view.goal_line({**goal, "kind": "min"}).used is None
    assert view.goal_line({**goal, "kind": "max_drop", "value": -1.0}).used == 0.0


def test_comparison_leaves_out_what_was_not_measured(make_report: Make) -> None:
    names = [line.name for line in view.comparison_lines(make_report())]
    assert "peak memory" in names
    assert not [name for name in names if "energy" in name or "cost" in name]


def test_comparison_says_what_changed(make_report: Make) -> None:
    lines = {line.name: line for line in view.comparison_lines(make_report())}
    quality = lines["accuracy, test split, 10,000 samples"]
    assert (quality.baseline, quality.final, quality.change) == ("0.9325", "0.9288", "-0.0037 (-0.4 %)")
    assert quality.better is False
    assert lines["file size"].change == "14.4x smaller"
    latency = lines["latency, median (p50)"]
    # 1 / 0.2421, and of the interval 0.2366 to 0.2473.
    assert latency.change == "4.13x faster (95 % 4.04x to 4.23x)"
    assert latency.better is True


def test_lower_may_be_better(make_report: Make) -> None:
    report = make_report()
    for part in ("baseline", "final"):
        report[part]["quality"] |= {"metric": "error", "higher_is_better": False}
    assert view.comparison_lines(report)[0].better is True


def test_no_real_difference_is_neither_better_nor_worse(make_report: Make) -> None:
    report = make_report()
    report["final"]["latency_ms"] |= {"ratio_to_baseline": 0.98, "ratio_ci95": [0.97, 0.99]}
    line = next(line for line in view.comparison_lines(report) if "p50" in line.name)
    assert line.better is None
    assert line.change.startswith("no real difference")


def test_an_estimated_energy_is_labelled(make_report: Make) -> None:
    report = make_report()
    for part in ("baseline", "final"):
        report[part]["energy_j"] = 15.0 * report[part]["latency_ms"]["p50"] / 1000
    assert not view.energy_is_estimate(report)
    report["device"]["watts"] = 15.0
    assert view.energy_is_estimate(report)
    assert any("estimate" in line.name for line in view.comparison_lines(report))
    report["final"]["energy_j"] *= 1.1
    assert not view.energy_is_estimate(report)


def test_stages_say_what_they_gained_and_cost(make_report: Make) -> None:
    stages = view.stages_view(make_report())
    assert (stages.metric, stages.split, stages.measured) == ("accuracy", "val", False)
    assert [line.name for line in stages.lines] == ["baseline", "prune", "recover", "quantize"]
    assert [line.quality_change for line in stages.lines] == ["", "-0.0134", "+0.0105", "-0.0011"]
    assert [line.worse for line in stages.lines] == [False, True, False, True]
    assert stages.lines[1].macs_kept == pytest.approx(8_420_000 / 34_120_000)
    assert [line.cached for line in stages.lines] == [True, False, False, False]
    assert stages.total == "57 min 20 s"


def test_a_first_stage_has_nothing_to_compare_with(make_report: Make) -> None:
    # The baseline's quality is of the test split: it must not be subtracted from one of val.
    assert view.stages_view(make_report(preparation=None)).lines[0].quality_change == ""


@pytest.mark.parametrize(
    ("met", "words"),
    [
        ([], "no goals were set"),
        ([True], "the goal is met"),
        ([True, True], "all goals met"),
        ([True, False, False], "2 of 3 goals missed"),
    ],
)
def test_outcome(make_report: Make, met: list[bool], words: str) -> None:
    assert view.outcome(make_report(goals=[{"met": one} for one in met])) == words


def test_bits_of_layers_are_shown_with_what_they_add_to_the_loss(make_report: Make) -> None:
    report = make_report()
    layers = [
        {"name": "stem", "weight_bits": 8, "activation_bits": 8, "per_channel": True},
        {"name": "body", "weight_bits": 2, "activation_bits": 6, "per_channel": True},
    ]
    costs = [{"name": "body", "bits": [8, 2], "added_cost": [0.0, 0.0125]}]
    report["stages"][2]["notes"] = {"layers": layers, "sensitivities": costs}
    *others, stage = view.stages_view(report).lines
    assert not any(view.layer_lines(other) for other in others)
    assert view.layer_lines(stage) == [
        view.LayerLine("stem", 8, 8, 1.0, ""),
        view.LayerLine("body", 2, 6, 0.25, "0.01250"),
    ]
    page = html.page(report)
    assert "<code>body</code></td><td>2" in page
    assert "width:25.0%" in page


def test_kernels_are_told_of_quantized_files_alone(make_report: Make) -> None:
    line = view.kernels_line(make_report())
    assert line.startswith("21 of 21 quantized layers on integer kernels; 4 conversions of values; in float: ")
    assert line.endswith("2 Softmax, 1 layer with weights")
    assert view.kernels_line(make_report(kernels=None)) == ""
