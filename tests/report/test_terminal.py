from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mil_cli.report.plan import render_plan
from mil_cli.report.terminal import FILES, render
from mil_cli.run.plan import Plan, PlannedStage

Make = Callable[..., dict[str, Any]]


def printed(report: dict[str, Any], *, width: int = 80, **options: Any) -> str:
    stream = io.StringIO()
    render(report, Console(file=stream, width=width), **options)
    return stream.getvalue()


def test_everything_that_matters_is_printed(make_report: Make) -> None:
    output = printed(make_report())
    for words in (
        "resnet20_prune_distill_int8: 1 of 3 goals missed",
        "host_cpu, AMD EPYC, 1 thread, onnxruntime 1.32.0",
        "missed",
        "4.13x faster (95 % 4.04x to 4.23x)",
        "accuracy (val)",
        "accuracy, test split, 10,000 samples",
        "10 min 13 s",
        "(cached)",
        "0.9288 in onnxruntime, 0.9288 in torch",
        "predictions agree: 99.99 %",
        "note: the batch axis of input x is free",
    ):
        assert words in output


def test_the_steps_to_a_quality_are_told_beside_plain_trainings(make_report: Make) -> None:
    output = printed(make_report())
    assert (
        "recover: accuracy of 0.8900 on val: reached after 390 steps, by plain training of the same student after 780"
        " (50 % of the steps)" in output
    )
    assert "accuracy of 0.9500 on val: never reached, by plain training of the same student after 780" in output
    assert "distilled training took 10 min 13 s, plain training 6 min 52 s" in output


def test_nothing_is_wrapped_off_a_terminal(make_report: Make) -> None:
    report = make_report(notices=["a long notice " * 30])
    report["stages"][0]["name"] = "a_stage_with_quite_a_long_name_that_somebody_chose" * 2
    lines = printed(report, width=80).splitlines()
    row = next(line for line in lines if report["stages"][0]["name"] in line)
    assert "prune/magnitude" in row
    assert "6 min 42 s" in row
    assert next(line for line in lines if "a long notice" in line).count("notice") == 30


def test_a_narrow_terminal_gets_lines_that_fit(make_report: Make) -> None:
    stream = io.StringIO()
    render(make_report(), Console(file=stream, width=80, force_terminal=True, color_system=None))
    assert max(len(line) for line in stream.getvalue().splitlines()) <= 80


def test_names_are_not_read_as_markup(make_report: Make) -> None:
    report = make_report(name="[bold]odd[/bold]", notices=["[/red] and [link=x]"])
    report["stages"][0]["name"] = "[red]prune"
    output = printed(report)
    for words in ("[bold]odd[/bold]", "[/red] and [link=x]", "[red]prune"):
        assert words in output


def test_a_report_without_goals_stages_or_measurements_is_printed(make_report: Make) -> None:
    report = make_report(goals=[], goals_met=True, stages=[], preparation=None, parity=None, device=None, notices=[])
    for part in ("baseline", "final"):
        for key in ("latency_ms", "throughput_per_s", "peak_memory_bytes", "size_bytes"):
            report[part][key] = None
    output = printed(report)
    assert "no goals were set" in output
    assert "was not compared" in output


def test_the_files_that_are_there_are_named(tmp_path: Path, make_report: Make) -> None:
    for name in ("model.onnx", "report.html"):
        (tmp_path / name).touch()
    output = printed(make_report(), directory=tmp_path)
    assert [name for name in FILES if str(tmp_path / name) in output] == ["model.onnx", "report.html"]


def test_a_plan_is_printed() -> None:
    plan = Plan(
        name="demo",
        macs=1_000_000,
        params=2_000,
        samples={"train": 1000, "val": 100, "test": 100},
        stages=[PlannedStage("prune", "prune", "magnitude", 90.0, 300_000, 700)],
        goals={"latency": {"max_ratio": 0.25, "max": 0.002}},
        dynamic={"x": {"0": "batch"}},
        notices=["something [odd]"],
    )
    stream = io.StringIO()
    render_plan(plan, Console(file=stream, width=80))
    output = stream.getvalue()
    for words in (
        "1,000 train",
        "0 (batch)",
        "30.0 %",
        "1 min 30 s",
        "at most 0.250x",
        "at most 2.00 ms",
        "something [odd]",
    ):
        assert words in output


def test_a_plan_tells_which_counts_its_targets_miss() -> None:
    goals = {"macs": {"max": 200_000, "max_ratio": 0.5}, "params": {"max_ratio": 0.3}, "size": {"max": 9.0}}
    stages = [PlannedStage("prune", "prune", "magnitude", 1.0, 300_000, 700)]
    stream = io.StringIO()
    render_plan(Plan("demo", 1_000_000, 2_000, {}, stages, goals, {}, []), Console(file=stream, width=100))
    rows = {line.split("  ")[0].strip(): line.rstrip() for line in stream.getvalue().partition("Goals")[2].splitlines()}
    assert rows["macs"].endswith("300 k, above it")
    assert rows["macs, relative to baseline"].endswith("0.300x")
    assert rows["params, relative to baseline"].endswith("0.350x, above it")
    assert rows["size"].endswith("9 B")  # the bound, and nothing beside it


@pytest.mark.parametrize(
    "missing", ["preparation", "device", "command", "name", "environment", "baseline_parity", "kernels"]
)
def test_parts_beyond_the_format_may_be_missing(make_report: Make, missing: str) -> None:
    report = make_report()
    del report[missing]
    assert "1 of 3 goals missed" in printed(report)
