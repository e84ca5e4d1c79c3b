"""Checkpoints of the loop: killed at any moment, a training ends to the bit as if it had not been."""

from __future__ import annotations

from typing import Any

import pytest

from mil_cli.data.base import Data
from mil_cli.graph.model import Model
from mil_cli.task.classification import Classification
from mil_cli.training.loop import fit
from tests.training.loops import Killed, Recorder, Slot, same_weights, short_settings

VARIANTS: dict[str, dict[str, Any]] = {
    "sgd onecycle": {},
    "adamw ema clip": {
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.1},
        "learning_rate": None,
        "ema": 0.9,
        "gradient_clip": 0.5,
        "scheduler": {"name": "cosine", "warmup": 0.2},
    },
    "steps by epoch, early stopping": {
        "scheduler": {"_target_": "torch.optim.lr_scheduler.MultiStepLR", "milestones": [1, 2], "gamma": 0.1},
        "early_stopping": 1,
        "epochs": 4,
    },
    "contiguous": {"channels_last": False, "evaluate_every": 2},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_killed_and_resumed_is_bit_identical(
    changes: dict[str, Any], tiny: Model, patterns: Data, task: Classification
) -> None:
    settings = short_settings(**changes)

    def run(slot: Slot) -> Any:
        return fit(tiny, task=task, data=patterns, settings=settings, seed=3, checkpoint=slot)

    whole_slot = Slot()
    whole = run(whole_slot)
    for kill_at in (1, 2, 4, 5, 9, whole_slot.saves):
        slot = Slot(kill_at)
        with pytest.raises(Killed):
            run(slot)
        resumed = run(slot)
        assert same_weights(resumed.model, whole.model), kill_at
        assert resumed.history == whole.history
        assert resumed.stopped == whole.stopped


def test_killed_many_times(tiny: Model, patterns: Data, task: Classification) -> None:
    settings = short_settings()
    whole = fit(tiny, task=task, data=patterns, settings=settings, seed=3)
    slot = Slot()
    for kill_at in (3, 1, 2, 4):
        slot.saves, slot.kill_at = 0, kill_at
        with pytest.raises(Killed):
            fit(tiny, task=task, data=patterns, settings=settings, seed=3, checkpoint=slot)
    slot.kill_at = None
    resumed = fit(tiny, task=task, data=patterns, settings=settings, seed=3, checkpoint=slot)
    assert same_weights(resumed.model, whole.model)


def test_a_finished_training_is_not_repeated(tiny: Model, patterns: Data, task: Classification) -> None:
    slot, settings = Slot(), short_settings()
    first = fit(tiny, task=task, data=patterns, settings=settings, seed=3, checkpoint=slot)
    saves = slot.saves

    def never(model: Model, steps: int, total: int) -> None:
        raise AssertionError("a step was made")

    again = fit(tiny, task=task, data=patterns, settings=settings, seed=3, checkpoint=slot, before_step=never)
    assert same_weights(first.model, again.model)
    assert slot.saves == saves


@pytest.mark.parametrize("changes", [{"epochs": 4}, {"learning_rate": 0.01}, {"ema": 0.9}])
def test_a_checkpoint_of_other_settings_is_ignored(
    changes: dict[str, Any], tiny: Model, patterns: Data, task: Classification
) -> None:
    slot = Slot()
    fit(tiny, task=task, data=patterns, settings=short_settings(), seed=3, checkpoint=slot)
    progress = Recorder()
    settings = short_settings(**changes)
    mixed = fit(tiny, task=task, data=patterns, settings=settings, seed=3, checkpoint=slot, progress=progress)
    clean = fit(tiny, task=task, data=patterns, settings=settings, seed=3)
    assert same_weights(mixed.model, clean.model)
    assert "ignored" in progress.notices[0]


def test_checkpoints_come_by_the_clock(tiny: Model, patterns: Data, task: Classification) -> None:
    now = 0.0

    def step(model: Model, steps: int, total: int) -> None:
        nonlocal now
        now += 10.0

    def saves(every: float) -> int:
        slot = Slot()
        settings = short_settings(epochs=4, checkpoint_every_seconds=every)
        fit(
            tiny,
            task=task,
            data=patterns,
            settings=settings,
            seed=1,
            checkpoint=slot,
            before_step=step,
            clock=lambda: now,
        )
        return slot.saves

    assert saves(15.0) == 4 * 2  # an epoch has four steps of 10 s: in its middle and at its end
    assert saves(1e6) == 4
    assert saves(0.0) == 4 * 4
