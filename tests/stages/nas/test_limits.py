"""Searches under several bounds: shares, a latency that is predicted too low and corrected, what is impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn

from mil_cli.errors import ModelError, StageError
from mil_cli.graph.coupling import Counter, MemoryEstimate, analyse
from mil_cli.graph.model import Model
from mil_cli.spaces import Architecture, Choice, DesignedSpace
from mil_cli.stages import measured as measured_file
from mil_cli.stages.nas.limits import Limited, LimitedConfig, search_limited
from mil_cli.stages.nas.search.evolution import Evolution
from mil_cli.stages.nas.search.nsga2 import NSGA2
from tests.stages.nas.designed import context, incoming
from tests.stages.nas.test_latency import COUNTER, SPACE, pretend, true_seconds


class Config(LimitedConfig):
    method: ClassVar[str] = "limited"


def run(workspace: Path | None = None, build: Any = None, **settings: Any) -> Limited:
    """Search for the architecture with most operations."""
    settings.setdefault("search", Evolution(evaluations=32, population=12, batch=4))
    return search_limited(
        SPACE,
        incoming(),
        Config(**settings),
        score=lambda architecture, fidelity: float(COUNTER.macs(architecture)),
        build=build,
        context=context(workspace, name="nas"),
    )


def estimated(model: Model) -> int:
    return MemoryEstimate(Counter(analyse(model)))({})


def test_shares_are_of_the_largest_architecture_and_several_bounds_hold() -> None:
    limited = run(macs=0.5, params=0.4)
    assert limited.bounds.most == {"macs": 0.5 * incoming().macs(), "params": 0.4 * incoming().num_params()}
    built = context().capture(SPACE.build(limited.found.best.candidate))
    assert built.macs() == limited.found.best.costs["macs"] <= 0.5 * incoming().macs()
    assert built.num_params() == limited.found.best.costs["params"] <= 0.4 * incoming().num_params()
    assert limited.facts()["architecture"] == limited.found.best.candidate.to_json()


def test_what_even_the_smallest_does_not_keep_is_told() -> None:
    with pytest.raises(StageError, match="the smallest architecture has") as caught:
        run(params=10 / incoming().num_params())
    assert caught.value.where == "stages.nas.params"


def test_an_operator_that_does_not_run_is_told_before_anything_is_scored() -> None:
    large = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 10))
    operators: dict[str, nn.Module] = {"small": nn.Linear(64, 10), "odd": nn.Linear(65, 10), "large": large}
    space = DesignedSpace(nn.Sequential(nn.Flatten(), Choice(operators)))
    model = Model.capture(space.build(space.largest), incoming().samples[0])
    assert "1=odd" not in (str(space.smallest), str(space.largest))

    def score(architecture: Architecture, fidelity: float) -> float:
        raise AssertionError

    with pytest.raises(ModelError, match=r"does not run on the shapes of a sample.*1=odd"):
        search_limited(space, model, Config(), score=score, build=None, context=context())  # type: ignore[arg-type]


def test_memory_is_bounded_by_what_the_captured_winner_says() -> None:
    limited = run(memory=0.6)
    most = limited.bounds.most["memory"]
    assert most == 0.6 * estimated(incoming())
    built = context().capture(SPACE.build(limited.found.best.candidate))
    assert estimated(built) == limited.facts()["memory"] <= most
    assert limited.found.best.candidate != SPACE.largest  # which has most operations
    with pytest.raises(StageError, match=r"the smallest architecture has .* bytes of estimated memory") as caught:
        run(memory="1 kB")
    assert caught.value.where == "stages.nas.memory"


def test_only_what_is_known_of_architectures_can_be_made_small() -> None:
    for name in ("size", "memory", "latency"):
        with pytest.raises(ValueError, match=f"{name} of architectures is not known here; choose from macs, params, "):
            Config(macs=0.5, search=NSGA2(costs=(name,)))
    front = run(memory=0.8, search=NSGA2(evaluations=16, population=8, costs=("memory",))).found
    assert len({trial.costs["memory"] for trial in front.trials}) > 1


def test_the_winner_keeps_its_latency_when_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is predicted is too low by a factor, but for the largest architecture."""
    pretend(monkeypatch)
    ratios: list[float] = []

    def ratio(one: Any, original: object, _: object) -> float:
        ratios.append(1.15 * true_seconds(one) / true_seconds(SPACE.largest))
        return ratios[-1]

    monkeypatch.setattr(measured_file, "latency_ratio", ratio)
    limited = run(tmp_path, build=lambda one: one, latency=0.7, latency_samples=12)
    goal = 0.7 * true_seconds(SPACE.largest)
    assert ratios[0] > 0.7  # by prediction alone it would have been missed
    assert 0.85 * goal < 1.15 * true_seconds(limited.found.best.candidate) <= goal
    assert limited.seconds == pytest.approx(1.15 * true_seconds(limited.found.best.candidate))
    measured = len(ratios)
    again = run(tmp_path, build=lambda one: one, latency=0.7, latency_samples=12)
    assert again.found == limited.found
    assert len(ratios) == measured
