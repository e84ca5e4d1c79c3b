"""Predicted latencies against work that is known to take so long, and against the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mil_cli.graph.model import Model
from mil_cli.spaces import Architecture, CostCounter, DesignedSpace, Linear, Width
from mil_cli.stages.nas import latency as latency_file
from mil_cli.stages.nas.latency import PredictedLatency, WorkRegression
from tests.stages.contexts import Kill
from tests.stages.nas.designed import context, incoming, space


def test_what_work_takes_is_found_and_none_takes_less_than_no_time() -> None:
    generator = np.random.default_rng(0)
    work = generator.uniform(1, 100, size=(40, 3)) * [1e3, 1.0, 1e6]
    seconds = 2e-3 + work @ [3e-6, 0.0, 1e-8]
    fitted = WorkRegression().fit(work, seconds, 0)
    np.testing.assert_allclose(fitted.weights, [3e-6, 0.0, 1e-8, 2e-3], rtol=1e-6, atol=1e-12)
    assert fitted.error < 1e-6
    disturbed = WorkRegression().fit(work, seconds * generator.normal(1, 0.05, size=40), 0)
    assert disturbed.error == pytest.approx(0.05, rel=0.4)
    assert (disturbed.weights >= 0).all()
    np.testing.assert_allclose(disturbed.predict(work).mean, seconds, rtol=0.1)
    np.testing.assert_allclose(disturbed.predict(work).deviation / disturbed.predict(work).mean, disturbed.error)


SPACE = space()
COUNTER = CostCounter(SPACE, (torch.zeros(1, 1, 8, 8),))


def true_seconds(architecture: Architecture) -> float:
    work = COUNTER.work(architecture)
    return 1e-4 + sum(count * (1e-9 if kind.endswith("macs") else 1e-8) for kind, count in work.items())


def pretend(monkeypatch: pytest.MonkeyPatch) -> list[Architecture]:
    """Let measured seconds be a sum over work; returns what is measured."""
    measured: list[Architecture] = []

    def ratios(models: list[Architecture], reference: Model, _: object) -> list[float]:
        measured.extend(models)
        return [true_seconds(one) / true_seconds(SPACE.largest) for one in models]

    monkeypatch.setattr(latency_file, "latency_ratios", ratios)
    monkeypatch.setattr(latency_file, "latency_seconds", lambda model, _: true_seconds(SPACE.largest))
    return measured


def _predictor(workspace: Path, samples: int = 12) -> PredictedLatency:
    return PredictedLatency(
        SPACE,
        COUNTER,
        build=lambda one: one,  # type: ignore[arg-type, return-value]
        original=None,  # type: ignore[arg-type]
        context=context(workspace),
        samples=samples,
    )


def test_architectures_that_were_not_measured_are_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = pretend(monkeypatch)
    predictor = _predictor(tmp_path)
    assert len(set(measured)) == len(measured) == 12
    assert {SPACE.smallest, SPACE.largest} <= set(measured)
    generator = torch.Generator().manual_seed(5)
    for _ in range(8):
        one = SPACE.sample(generator)
        assert predictor(one) == pytest.approx(true_seconds(one), rel=1e-3)
    facts = predictor.describe()
    assert facts["measured"] == 12
    assert facts["error_of_90_percent"] < 0.05


def test_going_on_after_a_kill_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = pretend(monkeypatch)
    whole = _predictor(tmp_path / "whole").describe()
    measured.clear()
    ratios = latency_file.latency_ratios

    def failing(models: Any, *rest: Any) -> list[float]:
        if len(measured) == 8:
            raise Kill
        return ratios(models, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(latency_file, "latency_ratios", failing)
        with pytest.raises(Kill):
            _predictor(tmp_path / "killed")
    assert _predictor(tmp_path / "killed").describe() == whole
    assert len(set(measured)) == len(measured) == 12


def test_a_space_of_two_architectures_has_both_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_file, "latency_ratios", lambda models, *_: [0.5, 1.0][: len(models)])
    monkeypatch.setattr(latency_file, "latency_seconds", lambda *_: 2e-3)
    two = DesignedSpace(nn.Sequential(nn.Flatten(), Linear(64, Width([8, 1024]), bias=False)))
    predictor = PredictedLatency(
        two,
        CostCounter(two, (torch.zeros(1, 1, 8, 8),)),
        build=lambda one: one,  # type: ignore[arg-type, return-value]
        original=None,  # type: ignore[arg-type]
        context=context(tmp_path),
        samples=12,
    )
    assert [predictor(one) for one in (two.smallest, two.largest)] == pytest.approx([1e-3, 2e-3])
    facts = predictor.describe()
    assert facts["measured"] == 2
    assert "median_error" not in facts


@pytest.mark.slow
def test_held_out_architectures_are_near_what_they_take_here(tmp_path: Path) -> None:
    around = context(tmp_path)
    predictor = PredictedLatency(
        SPACE,
        COUNTER,
        build=lambda one: around.capture(SPACE.build(one)),
        original=incoming(),
        context=around,
        samples=24,
    )
    assert predictor.describe()["median_error"] < 0.2  # a busy machine
