from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mil_cli.errors import OutputError
from mil_cli.report.sweep import join_sweep, labels, render_sweep, sweep_json, sweep_page

Make = Callable[..., dict[str, Any]]
Point = tuple[float, float, float]


@pytest.fixture
def write_sweep(tmp_path: Path, make_report: Make) -> Callable[..., Path]:
    """Return a function that writes a sweep whose points have these qualities, latency ratios and sizes."""

    def write(points: list[Point], *, higher_is_better: bool = True, overrides: list[list[str]] | None = None) -> Path:
        directory = tmp_path / "sweep"
        for number, (quality, ratio, size) in enumerate(points):
            folder = directory / str(number)
            folder.mkdir(parents=True)
            report = make_report()
            report["final"]["size_bytes"] = size
            report["final"]["quality"]["value"] = quality
            for part in ("baseline", "final"):
                report[part]["quality"]["higher_is_better"] = higher_is_better
            report["final"]["latency_ms"] |= {"ratio_to_baseline": ratio, "ratio_ci95": [0.99 * ratio, 1.01 * ratio]}
            (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
            if overrides is not None:
                outcome = {"overrides": overrides[number], "exit_code": 3, "message": ""}
                (folder / "point.json").write_text(json.dumps(outcome), encoding="utf-8")
        return directory

    return write


def test_the_front_is_that_of_brute_force(write_sweep: Callable[..., Path]) -> None:
    generator = np.random.default_rng(0)
    # Latencies 10 % apart, so that the tolerance plays no part.
    points = [
        (float(generator.integers(5)), float(1.1 ** generator.integers(5)), float(generator.integers(1, 5)))
        for _ in range(30)
    ]
    expected = [
        not any(other != own and other[0] >= own[0] and other[1] <= own[1] and other[2] <= own[2] for other in points)
        for own in points
    ]
    assert 0 < sum(expected) < len(points)
    assert [point.on_front for point in join_sweep(write_sweep(points)).points] == expected


def test_a_lower_metric_may_be_better(write_sweep: Callable[..., Path]) -> None:
    sweep = join_sweep(write_sweep([(0.1, 0.5, 100), (0.2, 0.5, 100)], higher_is_better=False))
    assert [point.on_front for point in sweep.points] == [True, False]


def test_latencies_within_three_percent_are_equal(write_sweep: Callable[..., Path]) -> None:
    sweep = join_sweep(write_sweep([(0.9, 0.500, 100), (0.9, 0.495, 120), (0.9, 0.45, 120)]))
    assert [point.on_front for point in sweep.points] == [True, False, True]


def test_dominance_never_leaves_a_front_empty(write_sweep: Callable[..., Path]) -> None:
    grid = itertools.product((0.8, 0.9), (0.5, 0.51, 0.52, 0.53), (100.0, 200.0))
    assert any(point.on_front for point in join_sweep(write_sweep(list(grid))).points)


def test_points_are_in_the_order_of_their_numbers(write_sweep: Callable[..., Path]) -> None:
    sweep = join_sweep(write_sweep([(0.9, 0.5, 100)] * 12))
    assert [point.name for point in sweep.points] == [str(number) for number in range(12)]


def test_overrides_are_shortened_as_far_as_they_stay_clear(write_sweep: Callable[..., Path]) -> None:
    overrides = [["stages.a.bits=4", "stages.b.bits=8", "stages.a.observer=mse", "seed=1"], []]
    sweep = join_sweep(write_sweep([(0.9, 0.5, 100)] * 2, overrides=overrides))
    assert labels(sweep) == {"0": "a.bits=4 b.bits=8 observer=mse seed=1", "1": "1"}


def test_what_all_points_share_is_shown_once(write_sweep: Callable[..., Path]) -> None:
    shared = ["chain=[quantize]", "~goals.cost=null"]
    overrides = [[*shared, "stages.a.bits=4"], [*shared, "stages.a.bits=8", "~goals.macs=null"]]
    directory = write_sweep([(0.9, 0.5, 100)] * 2, overrides=overrides)
    sweep, stream = join_sweep(directory), io.StringIO()
    assert labels(sweep) == {"0": "bits=4", "1": "bits=8 ~goals.macs"}
    render_sweep(directory, Console(file=stream, width=200))
    assert stream.getvalue().count("every point: chain=[quantize] ~goals.cost\n") == 1
    page = sweep_page(sweep)
    assert page.count("~goals.cost") == page.count("chain=[quantize]") == 1
    assert "=null" not in page + stream.getvalue()


def test_a_sweep_is_printed_and_written(write_sweep: Callable[..., Path]) -> None:
    directory = write_sweep([(0.93, 0.25, 300_000), (0.9, 0.3, 310_000)], overrides=[["a.b=1"], ["a.b=2"]])
    failed = directory / "2"
    failed.mkdir()
    outcome = {"overrides": ["a.b=3"], "exit_code": 2, "message": "a.b: must be below 3\n  -> change a.b"}
    (failed / "point.json").write_text(json.dumps(outcome), encoding="utf-8")
    stream = io.StringIO()
    render_sweep(directory, Console(file=stream, width=80))
    output = stream.getvalue()
    assert "3 points" in output
    assert "0.250 (0.247 to 0.253)" in output
    assert "did not end" in output
    assert "point 2: a.b: must be below 3" in output
    rows = {line.split("b=")[1][0]: line for line in output.splitlines() if " b=" in line}
    assert rows["1"].startswith(" *")
    assert not rows["2"].startswith(" *")

    content = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))
    assert content["version"] == 1
    assert content["front"] == ["0"]
    assert [point["goals_met"] for point in content["points"]] == [False, False, None]
    assert content["points"][2]["problem"] == "a.b: must be below 3"
    assert content["points"][0]["final"]["size_bytes"] == 300_000
    page = (directory / "sweep.html").read_text(encoding="utf-8")
    assert "0 of 3 points meet all goals" in page
    assert "a.b: must be below 3" in page
    assert page.count("<svg") == 2
    assert "http" not in page


def test_a_point_that_failed_now_does_not_show_an_older_report(write_sweep: Callable[..., Path]) -> None:
    directory = write_sweep([(0.9, 0.5, 100)], overrides=[["a=1"]])
    (directory / "0" / "point.json").write_text('{"overrides": ["a=1"], "exit_code": 1, "message": "boom"}')
    point = join_sweep(directory).points[0]
    assert point.report is None
    assert point.problem == "boom"


def test_a_link_to_the_latest_run_is_no_second_point(write_sweep: Callable[..., Path]) -> None:
    directory = write_sweep([(0.9, 0.5, 100)])
    (directory / "latest").symlink_to("0")
    assert [point.name for point in join_sweep(directory).points] == ["0"]


def test_different_baselines_are_compared_in_milliseconds(write_sweep: Callable[..., Path]) -> None:
    directory = write_sweep([(0.9, 0.5, 100), (0.9, 0.4, 100)])
    file = directory / "1" / "report.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    report["baseline"]["params"] += 1
    report["final"]["latency_ms"]["p50"] *= 2
    file.write_text(json.dumps(report), encoding="utf-8")
    sweep = join_sweep(directory)
    assert [point.on_front for point in sweep.points] == [True, False]
    assert "different uncompressed models" in sweep.notices[0]
    assert "median latency, ms" in sweep_page(sweep)


def test_different_metrics_are_not_ranked(write_sweep: Callable[..., Path]) -> None:
    directory = write_sweep([(0.9, 0.5, 100), (0.9, 0.4, 100)])
    file = directory / "1" / "report.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    report["final"]["quality"]["metric"] = "psnr"
    file.write_text(json.dumps(report), encoding="utf-8")
    sweep = join_sweep(directory)
    assert not any(point.on_front for point in sweep.points)
    assert "different metrics" in sweep_json(sweep)["notices"][0]
    assert "<svg" not in sweep_page(sweep)


@pytest.mark.parametrize(("create", "words"), [(False, "no such folder"), (True, "no run in this folder")])
def test_a_folder_without_runs_is_explained(tmp_path: Path, create: bool, words: str) -> None:
    folder = tmp_path / "empty"
    if create:
        folder.mkdir()
    with pytest.raises(OutputError, match=words):
        join_sweep(folder)


def test_a_sweep_of_failures_is_shown(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "point.json").write_text('{"overrides": [], "exit_code": 1, "message": ""}', encoding="utf-8")
    stream = io.StringIO()
    render_sweep(tmp_path, Console(file=stream, width=80))
    assert "ended with exit code 1" in stream.getvalue()
    assert "did not end" in (tmp_path / "sweep.html").read_text(encoding="utf-8")
