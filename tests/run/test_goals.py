"""Verdicts on goals: every kind of bound, met and missed, and goals that cannot be judged."""

from __future__ import annotations

from typing import Any

import pytest

from mil_cli.errors import GoalError
from mil_cli.recipe.goals import Goals
from mil_cli.run.goals import judge, remedies, slowdowns
from mil_cli.stages.prune.magnitude import MagnitudeConfig
from mil_cli.stages.quantize.static import StaticConfig
from mil_cli.training.quality import relative_drop


def measurement(**changes: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "quality": {"metric": "accuracy", "value": 0.9, "higher_is_better": True, "samples": 100, "split": "test"},
        "params": 1000,
        "macs": 10_000,
        "size_bytes": 4000,
        "latency_ms": {"p50": 2.0, "ratio_to_baseline": 1.0, "ratio_ci95": [0.99, 1.01]},
        "peak_memory_bytes": 1e6,
        "energy_j": None,
        "cost_per_million": None,
    }
    return {**figures, **changes}


FINAL = measurement(
    quality={"metric": "accuracy", "value": 0.891, "higher_is_better": True, "samples": 100, "split": "test"},
    params=250,
    macs=2_500,
    size_bytes=400,
    latency_ms={"p50": 0.5, "ratio_to_baseline": 0.26, "ratio_ci95": [0.25, 0.27]},
)


@pytest.mark.parametrize(
    ("goal", "reached", "met"),
    [
        ({"quality": {"max_drop": "1%"}}, 0.01, True),
        ({"quality": {"max_drop": "0.9%"}}, 0.01, False),
        ({"quality": {"min": 0.9}}, 0.891, False),
        ({"latency": {"max_ratio": 0.25}}, 0.26, False),  # the paired ratio, not 0.5 / 2.0
        ({"latency": {"max": "0.5 ms"}}, 0.0005, True),
        ({"size": {"max": "0.4 kB"}}, 400, True),
        ({"size": {"max_ratio": 0.09}}, 0.1, False),
        ({"macs": {"max_ratio": 0.25}}, 0.25, True),
        ({"params": {"max": 249}}, 250, False),
        ({"memory": {"max_ratio": 1}}, 1.0, True),
    ],
)
def test_each_bound(goal: dict[str, Any], reached: float, met: bool) -> None:
    (verdict,) = judge(Goals.model_validate(goal), baseline=measurement(), final=FINAL)
    assert verdict.value == pytest.approx(reached)
    assert verdict.met is met


def test_a_goal_whose_figure_is_missing_is_an_error_and_never_met() -> None:
    with pytest.raises(GoalError, match=r"goals\.energy\.max"):
        judge(Goals.model_validate({"energy": {"max": 1}}), baseline=measurement(), final=FINAL)


def test_drop_knows_the_direction_of_the_metric() -> None:
    assert relative_drop(0.5, 0.4, higher_is_better=True) == pytest.approx(0.2)
    assert relative_drop(0.5, 0.4, higher_is_better=False) == pytest.approx(-0.2)
    assert relative_drop(0.0, 0.0, higher_is_better=True) == 0.0
    assert relative_drop(0.0, 0.1, higher_is_better=False) == float("inf")
    assert relative_drop(-10.0, -11.0, higher_is_better=True) == pytest.approx(0.1)


def timed(ratio: float, spread: float = 0.01) -> dict[str, Any]:
    return measurement(
        latency_ms={"p50": 2 * ratio, "ratio_to_baseline": ratio, "ratio_ci95": [ratio - spread, ratio + spread]}
    )


@pytest.mark.parametrize(
    ("ratio", "spread", "told"),
    [(0.5, 0.01, False), (1.02, 0.01, False), (1.2, 0.3, False), (1.2, 0.1, True)],
)
def test_a_slower_file_is_told_but_not_what_the_measurement_may_err_by(ratio: float, spread: float, told: bool) -> None:
    notices = slowdowns(timed(1.0, 0.0), [("prune", None), ("quantize", timed(ratio, spread))])
    assert len(notices) == told
    if told:
        assert "1.20 times its latency (95 % 1.10 to 1.30)" in notices[0]
        assert "measure.per_stage=true" in notices[0]
    assert not any("per_stage" in notice for notice in slowdowns(timed(1.0, 0.0), [("quantize", timed(ratio, spread))]))


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.99), (0.4, 0.4), (0.4, 0.39)])
def test_a_stage_that_quantizes_is_told_where_it_gains_no_time(before: float, after: float) -> None:
    baseline, quantized = timed(1.0, 0.0), ("quantize", timed(after))
    stages = [quantized] if before == 1 else [("prune", timed(before)), quantized]
    (notice,) = slowdowns(baseline, stages, {"quantize"})
    assert "no faster" in notice
    assert f"{after / before:.2f} times" in notice
    assert not slowdowns(baseline, stages)
    assert not slowdowns(baseline, [*stages[:-1], ("quantize", timed(after / 2))], {"quantize"})


def test_what_helps_against_slow_integers_is_told_where_it_is_not_done_yet() -> None:
    stages = [("cut", MagnitudeConfig(macs=0.5)), ("one", StaticConfig()), ("two", StaticConfig(latency_aware=True))]
    (told,) = remedies(["the final file is slower"], stages)
    assert told.startswith("stages.one.latency_aware=true")
    assert remedies([], stages) == []


def test_the_stage_that_slows_is_named_though_the_whole_is_faster() -> None:
    stages: list[tuple[str, dict[str, Any] | None]] = [
        ("prune", timed(0.4)),
        ("quantize", timed(0.6)),
        ("recover", timed(0.605)),
    ]
    (notice,) = slowdowns(timed(1.0, 0.0), stages)
    assert "'quantize'" in notice
    assert "1.50 times" in notice
    told = slowdowns(timed(1.0, 0.0), [*stages, ("again", timed(1.3))])
    assert len(told) == 3
    assert all(name in notice for name, notice in zip(("'quantize'", "'again'", "the final file"), told, strict=True))
