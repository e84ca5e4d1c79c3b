"""The whole stage on digits: it keeps its bounds, works, and goes on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mil_cli.data.digits import digits
from mil_cli.errors import StageError
from mil_cli.stages.nas.from_scratch import FromScratchConfig, from_scratch
from mil_cli.stages.nas.search.driver import _Running
from mil_cli.stages.registry import config_type
from tests.stages.contexts import Kill, make_context
from tests.stages.nas.designed import context, incoming, space

QUICK: dict[str, Any] = {
    "macs": 0.7,
    "search": {"strategy": "halving", "evaluations": 2, "eta": 2, "rungs": 2},
    "trainer": {"epochs": 2, "batch_size": 256},
    "search_samples": 200,
}


def test_it_is_registered() -> None:
    assert config_type("nas", "from_scratch") is FromScratchConfig


def test_the_winner_keeps_the_bound_and_learnt(tmp_path: Path) -> None:
    used = context(tmp_path)
    config = FromScratchConfig(**{**QUICK, "recover_trainer": {"epochs": 4, "batch_size": 32}})
    winner = from_scratch(incoming(), config, used)
    assert winner.macs() == used.notes["macs"] <= 0.7 * incoming().macs()  # type: ignore[operator]
    assert used.evaluate(winner).value > 0.4
    assert used.notes["scored"] == 3  # two candidates for one epoch, the better one for both
    assert space().architecture(used.notes["architecture"]) is not None  # type: ignore[arg-type]


@pytest.mark.slow
def test_going_on_after_a_kill_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FromScratchConfig(**QUICK)
    whole = from_scratch(incoming(), config, context(tmp_path / "whole"))
    add = _Running.add

    def killed(self: _Running[Any], quality: float, *, seconds: float) -> None:
        add(self, quality, seconds=seconds)
        if len(self.trials) == 2:
            raise Kill

    with monkeypatch.context() as patched:
        patched.setattr(_Running, "add", killed)
        with pytest.raises(Kill):
            from_scratch(incoming(), config, context(tmp_path / "killed"))
    resumed = from_scratch(incoming(), config, context(tmp_path / "killed"))
    assert resumed.fingerprint() == whole.fingerprint()


@pytest.mark.slow  # each process imports torch
def test_candidates_trained_in_several_processes_are_the_same() -> None:
    notes = []
    for jobs in (1, 2):
        used = context()
        from_scratch(incoming(), FromScratchConfig(**{**QUICK, "search": {**QUICK["search"], "jobs": jobs}}), used)
        notes.append({name: used.notes[name] for name in ("front", "architecture", "search_quality")})
    assert notes[0] == notes[1]


def test_a_model_without_choices_is_told() -> None:
    with pytest.raises(StageError, match="choices"):
        from_scratch(incoming(), FromScratchConfig(**QUICK), make_context(digits(), name="nas"))


def test_rungs_that_would_train_alike_are_told(tmp_path: Path) -> None:
    config = FromScratchConfig(**{**QUICK, "search": {**QUICK["search"], "rungs": 3}})
    with pytest.raises(StageError, match="two rungs train for as many epochs: they are of 1, 1, 2") as told:
        from_scratch(incoming(), config, context(tmp_path))
    assert "4 say" in str(told.value.hint)
