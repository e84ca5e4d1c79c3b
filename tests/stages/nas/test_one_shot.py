"""One-shot searches as stages: they keep their bounds, go on after a kill, and say what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.stages.context import Context
from mil_cli.stages.nas.bignas import BigNasConfig
from mil_cli.stages.nas.one_shot import Judge
from mil_cli.stages.registry import check_order, config_type, function_of
from tests.stages.contexts import run_through_kills
from tests.stages.nas.designed import context, incoming

QUICK: dict[str, Any] = {
    "macs": 0.5,
    "params": "4k",
    "search": {"strategy": "evolution", "evaluations": 8, "population": 4, "batch": 2},
    "trainer": {"epochs": 1, "batch_size": 256, "checkpoint_every_seconds": 0},
    "search_samples": 200,
    "recalibrate_samples": 64,
}
METHODS = ("spos", "fairnas", "bignas", "ofa", "hypernetwork")


def _run(method: str, around: Context, **settings: Any) -> Model:
    config = config_type("nas", method).model_validate({**QUICK, **settings})
    return function_of(config)(incoming(), config, around)


@pytest.mark.parametrize("method", METHODS)
def test_the_winner_keeps_the_bounds_and_is_what_was_judged(method: str) -> None:
    around = context()
    found = _run(method, around, inherit=True)
    notes = around.notes
    assert found.macs() == notes["macs"] <= 0.5 * incoming().macs()
    assert found.num_params() == notes["params"] <= 4000
    assert around.evaluate(found, limit=200).value == notes["search_quality"]
    assert notes["scored"] == 8


@pytest.mark.slow
def test_a_search_that_was_killed_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _run("spos", context(tmp_path / "whole"), inherit=True)
    pieces = run_through_kills(
        lambda: _run("spos", context(tmp_path / "pieces"), inherit=True), monkeypatch, saves=[2, 5]
    )
    assert whole.fingerprint() == pieces.fingerprint()


@pytest.mark.slow
def test_a_winner_with_fresh_weights_is_trained_by_another_stage() -> None:
    stages = {"alone": config_type("train", "supervised").model_validate({"trainer": {"epochs": 6}})}
    around = context(stages=stages)
    found = _run("spos", around, recover="alone")
    assert around.evaluate(found).value > 0.5
    assert around.evaluate(_run("spos", context())).value < 0.3  # as the weights were drawn


def test_several_processes_are_refused() -> None:
    with pytest.raises(ValidationError, match="leave it at 1"):
        config_type("nas", "spos").model_validate({"search": {"strategy": "random", "jobs": 2}})


def test_a_bound_below_the_smallest_net_is_told_before_anything_is_trained() -> None:
    with pytest.raises(StageError, match=r"smallest architecture has [\d,]+ macs") as problem:
        _run("spos", context(), macs=0.0001, trainer={"epochs": 10_000})
    assert problem.value.where == "stages.stage.macs"


def test_nothing_may_come_before() -> None:
    train, search = config_type("train", "supervised")(), config_type("nas", "spos")()
    found = check_order([("train", train), ("search", search)])
    assert len(found) == 1
    assert "would be lost" in str(found[0])
    assert not check_order([("search", search), ("train", train)])


@pytest.mark.slow
def test_shared_weights_teach_a_space_the_digits() -> None:
    around = context()
    config = BigNasConfig.model_validate({"trainer": {"epochs": 40, "batch_size": 64}})
    shared = config.shared(incoming(), around)
    judge = Judge(shared, config, around)
    assert judge(shared.space.largest) > 0.9
    assert judge(shared.space.smallest) > 0.6
